"""How training moves the weights: schedules, optimizers and the router's selection bias."""
