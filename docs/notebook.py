# %% [markdown]
# # Train, score, look, calibrate
#
# One sitting with simsid, in seconds on a CPU and without a download: a small network trained on synthetic images, then
# the fitted model that comes with simsid on its twelve sample radiographs. Open this file as a notebook with
# [Jupytext](https://jupytext.readthedocs.io), or run it with `python docs/notebook.py`.
#
# **For research use only. simsid is not a medical device.**

# %%
import matplotlib.pyplot as plt
import numpy as np
import torch

import simsid
from simsid import data
from simsid.evaluation import evaluate, format_table
from simsid.metrics import false_positive_interval

torch.manual_seed(0)

# %% [markdown]
# ## Train
#
# DigitAnatomy: the digits one to nine in their places are "anatomy". The network sees normal images only. So little
# training does not make a good detector; `simsid demo` trains for a minute or two.

# %%
digits = data.DigitAnatomy(seed=0, train=64, val=20, test_normal=20, test_anomalous=40)
model = simsid.Model(simsid.Config.digit_anatomy(width=4, items=20, decoder_items=20, heads=4))
train, val, test = (digits.load(split, model.config.image_size) for split in ("train", "val", "test"))
settings = simsid.TrainingConfig(epochs=2, batch_size=8, learning_rate=2e-3, criterion="last")
history = simsid.Trainer(model, settings).fit(train, val)
print(f"{len(history.epochs)} epochs; calibrated on {model.calibration.count} images")

# %% [markdown]
# ## Score
#
# Every signal is computed. A higher value is more anomalous. Which signal is best depends on the anomalies, and
# `discriminator_per_image` is the papers'.

# %%
evaluation = evaluate(model, test)
print(format_table(evaluation))

# %% [markdown]
# ## Look
#
# Where do the highest scores come from? The map of the residual shows where input and reconstruction differ.

# %%
highest = np.argsort(-evaluation.signals["residual"])[:3]
images = test.batch(highest.tolist())
shown = {"input": images[:, 0], **model.pictures(images), "residual": model.maps(images, "residual")}
figure, axes = plt.subplots(len(shown), 3, figsize=(6, 6))
for line, (name, pictures) in zip(axes, shown.items()):
    for axis, picture, index in zip(line, pictures.numpy(), highest):
        axis.imshow(picture, cmap="inferno" if name == "residual" else "gray")
        axis.set(title=f"{name}: {test.findings[index]}", xticks=[], yticks=[])
figure.tight_layout()

# %% [markdown]
# And what do the memories hold? Each location's most used item of the last decoder memory, as the student draws it.

# %%
contents = model.memories(train)
for memory in contents:
    print(f"{memory.name}: {memory.dead.mean():.0%} of {memory.uses.numel()} items are dead")
plt.figure(figsize=(3, 3))
plt.imshow(contents[-1].decoded[0].numpy(), cmap="gray")

# %% [markdown]
# ## Radiographs
#
# The shipped model is a feature memory, fitted to normal chest radiographs of children. Six of the twelve sample films
# are normal.

# %%
zhanglab = simsid.load("zhanglab")
films = data.load_images(data.read_csv(data.SAMPLES), **zhanglab.preprocessing.to_dict())
scores = zhanglab.score(films)
for path, finding, score in zip(films.paths, films.findings, scores):
    print(f"{path.rsplit('/', 1)[-1]:35} {finding:10} {score:.3f}")
highest = films.batch([int(scores.argmax())])
figure, axes = plt.subplots(1, 2, figsize=(6, 3))
axes[0].imshow(highest[0, 0].numpy(), cmap="gray")
axes[1].imshow(zhanglab.maps(highest, "inpainting", batch_size=1)[0].numpy(), cmap="inferno")

# %% [markdown]
# ## Calibrate
#
# Thresholds do not transfer between hospitals: set yours on normal images of your own site. Six images are far too few:
# they guarantee no rate below 1 / 7, and the interval says how little is known. Take 100 or more for a rate of 0.05.
# The command line does the same with `simsid calibrate MODEL FOLDER --local`.

# %%
local = films.select(films.labels == 0)
zhanglab.calibrate(local, local)
low, high = false_positive_interval(len(local), 0.2)
threshold = zhanglab.calibration.threshold(zhanglab.signal, 0.2)
print(f"threshold {threshold:.2f}; the false positive rate on new images lies between {low:.2f} and {high:.2f}")
zhanglab.save("calibrated")
print(f"saved; {simsid.load('calibrated').signal} is the signal that scores")
