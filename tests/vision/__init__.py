"""Image classification networks of torchvision and timm."""
