"""Train trails: `steps`, an iterator over a run; and `trainable`, for a training loop that is someone else's.

    for step in steps(model, trails, [Imitate(examples)], steps=200, batch_size=8, lr=3e-3):
        if step.step % 50 == 0:
            print(step.loss)                 # stop, look, measure, change: it is your loop

    with trainable(model, trails):           # the same trails under a Hugging Face Trainer or TRL
        Trainer(model, arguments, train_dataset=rows).train()

Only the trails learn. The base is frozen meanwhile, and both leave its hooks, flags and modes as they found them.
"""

from tokenpaths.training.foreign import trainable as trainable
from tokenpaths.training.loop import Step as Step
from tokenpaths.training.loop import steps as steps
from tokenpaths.training.trust import TrustRegion as TrustRegion
