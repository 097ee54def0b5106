"""From a model to what runs elsewhere: ONNX and ``torch.export`` programs, checked against the model."""
