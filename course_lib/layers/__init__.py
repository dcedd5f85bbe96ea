"""The blocks a decoder is built from: linear, norm, rotary, activation, embedding."""
