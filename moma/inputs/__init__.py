"""Images and masks in. Nothing here knows a bundle or a method."""
