"""Images: reading files, and the image processor with transformers' options."""
