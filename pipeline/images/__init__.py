"""Files of images: which format they have, their size and type, and their pixels. See `pipeline.images.formats`."""
