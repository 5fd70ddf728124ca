"""A training that moves its model to a GPU, with a torch that has no CUDA."""

import torch

model = torch.nn.Linear(4, 4).cuda()
print(model)
