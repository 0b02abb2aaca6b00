"""The product on stock kernels: guests that boot under QEMU, and what runs in them."""
