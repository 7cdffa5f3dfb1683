"""What makes configurations, models and image processors objects of Hugging Face's: saving, the hub, ``isinstance``."""
