"""What a packed model is: description, weight formats, neuron bundles, the file. Reads; never writes."""
