"""Decode, crop, resize and flip a batch of images.

decoder.py      the interface (`Decoder`) and its types
cpu.py          `cpu`: threads on the CPU (jpeg_crop.c for JPEG, Pillow for PNG, pipeline.images for the rest)
dali.py         `dali`: NVIDIA DALI, on the CPU or on a CUDA device; `cpu` for what DALI does not decode alike
gpu_check.py    compares DALI's crops on a GPU with the CPU's, before a GPU is used
factory.py      `make_decoder` picks one of them

The caller computes the crop boxes (`pipeline.loading.crops`), so every decoder produces the same crops. On JPEGs
they differ by at most 0.3/255 on average from Pillow decoding, cropping and resizing the whole image; the rest
is rounding (DALI resizes in floats).

All decoders treat unusual images alike:

- All formats of `pipeline.images.formats` are decoded; anything else is a bad sample. JPEG may be baseline or
  progressive, Huffman or arithmetic, of any chroma subsampling, and grey, RGB, CMYK or YCCK (Adobe's inverted ones
  too). 12-bit JPEG is a bad sample. DALI gets JPEG, PNG and WebP; `cpu` decodes the rest of the batch.
- EXIF orientation and colour profiles are ignored, as in torchvision's ImageFolder.
- Grey, palette and 1-bit images are converted to RGB. Transparency is dropped, not blended.
- In 8-bit batches 16-bit images are scaled to 8 bits, by the bits that are used (`Pixels.bits`). `cpu` takes the high
  byte of PNGs, DALI rounds.
- Batches of 16 bits, of floats or of other numbers of channels are resized by torch in float32, and rounded for
  integers. Float images with NaN or infinity, and images with another number of channels, are bad samples.

They differ in this:

- CMYK, 1-bit and 16-bit images differ by up to 1/255 on average.
- Lossless JPEG (a medical format): DALI decodes it; `cpu` and `shards build` report a bad sample.
- Damage after the last row of the crop: DALI, and `cpu` for JPEG, stop before it and do not notice. Pillow, which
  decodes JPEG where `jpeg_crop` is not built, reads to the end. This only concerns files that were damaged before
  they were indexed: `shards build` and `verify` read every file to the end, and each read is checked against the
  index's crc32c.
- Flipped bits inside a JPEG: libjpeg, which all decoders use, continues after most of them. DALI's parser rejects
  some damaged headers that libjpeg accepts (about 5 of 1000 JPEGs with random damage).

DALI on a GPU: the GPU's JPEG engines decode baseline JPEGs. Its other cores decode the rest of the baseline JPEGs
and progressive ones, with the Huffman codes read by host threads. What nvJPEG does not support (CMYK, arithmetic) and
PNG are decoded on the host and copied. Which of these decodes an image depends on the batch that it is in, so its
pixels may change by rounding. Resizing and flipping happen on the GPU. This is taken from the sources of DALI and
nvImageCodec; it has not been measured on a GPU yet (`python -m benchmarks.gpu`), nor tested there (tests/gpu), and
neither has nvJPEG's handling of damaged files. Its crops are compared with the CPU's at each start (gpu_check.py).
"""
