"""A training-time method: channels that shall go fade away, a little in every step, while the network trains on."""

import secateur as sc


@sc.TRAINING_METHODS.register("fading")
class Fading:
    def __init__(self, steps: int = 50):
        self.left, self.done = steps, False

    def attach(self, model, graph, optimizer, budget):
        self.model, self.went = model, sc.allocate(graph, sc.score(model, graph), budget)
        return self

    def plan(self):
        return self.went

    def step(self):  # to be called after the optimizer's
        self.left, self.done = max(self.left - 1, 0), self.left <= 1
        for name, p in self.model.named_parameters():
            for dim, positions in self.went.slices.get(name, {}).items():
                p.data.movedim(dim, 0)[positions] *= self.left / (self.left + 1)
