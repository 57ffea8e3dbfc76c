"""Files in a folder or a bucket: ranged reads with retries, Parquet tables and tar headers."""
