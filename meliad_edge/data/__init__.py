"""Reading data sets, decoding images, drawing few-shot splits, preparing model input."""
