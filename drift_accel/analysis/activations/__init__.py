"""What networks have inside, of real and generated images: extracted once, stored, read by layer and class."""
