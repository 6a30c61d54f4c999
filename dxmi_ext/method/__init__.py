"""DxMI: noise, schedules, the sampler, costs, losses and the trainers that compose them."""
