"""The key pair that the S3 server of the tests accepts."""

ACCESS_KEY, SECRET_KEY = "AKIAMAXREELTEST", "squeamish/ossifrage+0123456789"
