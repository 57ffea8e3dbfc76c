"""Augmentation of labelled batches on the device.

mixing        random erasing, mixup, CutMix and label smoothing
randaugment   RandAugment and colour jitter (imports kornia, so import it only where it is used)

All draws are pure functions of (seed, epoch, sample id) on the host, so results do not depend on the world size, and the
host never waits for the device.
"""
