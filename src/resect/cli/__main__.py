"""What torchrun and accelerate launch start: `torchrun --nproc-per-node 2 -m resect.cli recover …`."""

from resect.cli import main

main()
