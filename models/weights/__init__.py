"""From public files to networks: formats, names, sizes, few bits, streaming."""
