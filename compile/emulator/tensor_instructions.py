"""Translation of tensor copies, wgmma and tcgen05."""
