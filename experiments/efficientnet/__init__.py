"""A pretrained convolutional network, EfficientNet-Lite0, made smaller by what images feed it."""
