"""What differs between JAX, TensorFlow and torch, so that no op has to know.

autodiff    a (forward, backward) pair as a differentiable function; products in full precision
iterate     a loop with a computed number of steps that can be differentiated
layer_programs   functions of layers that eager calls do not compile anew
loops       scans, and reading and writing rows at computed places
remat       recompute in the backward pass instead of keeping
platform    where tensors are, and which implementation of an op runs there
programs    functions of TensorFlow that are freed with the session, and gradients for them
seeds       random numbers from a seed tensor
"""
