"""`fuse`: models of other libraries run on the fused ops."""
