"""Text on S3, Google Cloud Storage, web servers and the Hub, read in ranges with retries."""
