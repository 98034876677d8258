"""What the commands share: options, settings records, sheets, charts, files."""
