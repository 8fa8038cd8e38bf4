"""Named recipes, as functions: where a run starts; the command line changes single fields.

`debug` runs on any pool on a CPU with a nano model of random weights, so its scores mean nothing; it proves the pipe.
The others name the models and sizes that DataComp's scales are filtered with.
"""

from __future__ import annotations

from collections.abc import Callable

from curation.recipe import Compute, CurateRecipe, Embed, OneOf, Select, Threshold, TrainRecipe, Write
from curation.recipe.columns import EmbeddingsRecipe, FactorsRecipe, FeaturesRecipe, MimicRecipe, Network, QualityRecipe
from curation.recipe.evaluate import STRAW_MEN, DiffusionRecipe, Generator, HeldOutRecipe, SubsetRecipe
from curation.recipe.made_columns import Language
from curation.recipe.nightly import NightlyRecipe
from curation.recipe.parts import Weights
from curation.recipe.rater import Proxy, RaterNetwork, RaterRecipe, RatingsRecipe, Teach
from curation.recipe.train_parts import LowResolution, Remember, Train, Workers

CLIP_B32 = Embed(model="ViT-B-32", pretrained="laion2b_s34b_b79k", batch_size=512)
CLIP_L14 = Embed(model="ViT-L-14", pretrained="datacomp_xl_s13b_b90k", batch_size=256)


def debug() -> CurateRecipe:
    """Any pool, a CPU, a nano model with random weights: the scores mean nothing."""
    return CurateRecipe(name="debug", embed=Embed(model="nano", batch_size=64), compute=Compute(device="cpu"))


def small() -> CurateRecipe:
    """Up to ten million samples on one GPU: CLIP ViT-B/32, the top 30% by score."""
    return CurateRecipe(name="small", embed=CLIP_B32, compute=Compute(device="cuda", decode_threads=8))


def medium() -> CurateRecipe:
    """About a hundred million samples on a few GPUs: CLIP ViT-B/32, two actors per GPU."""
    return CurateRecipe(
        name="medium", embed=CLIP_B32, compute=Compute(device="cuda", gpus_per_actor=0.5, decode_threads=8)
    )


def large() -> CurateRecipe:
    """About a billion samples on a cluster: CLIP ViT-L/14."""
    return CurateRecipe(name="large", embed=CLIP_L14, compute=Compute(device="cuda", decode_threads=8))


def laion() -> CurateRecipe:
    """Pools of billions, cut as LAION-5B's English part was (arXiv:2210.08402): OpenAI's ViT-B/32, score >= 0.28."""
    return CurateRecipe(
        name="laion",
        embed=Embed(model="ViT-B-32-quickgelu", pretrained="openai", batch_size=512),
        compute=Compute(device="cuda", gpus_per_actor=0.5, decode_threads=8),
        selection=(Select(method={"name": "clip_score"}, min_score=0.28),),
    )


def basic() -> CurateRecipe:
    """DataComp's metadata cut by its "basic" filter (arXiv:2304.14108): no model but fastText's, no image.

    The same rows as `baselines/apply_filter.py`, in the order of its tests; lid.176.bin is the model that it loads.
    """
    return CurateRecipe(
        name="basic",
        embed=Embed(cached="datacomp-l14"),
        columns=(Language(make="language", model="lid.176.bin"),),
        selection=(
            OneOf(column="language.label", one_of=("en",)),
            Threshold(column="caption_words", at_least=3),
            Threshold(column="caption_chars", at_least=6),
            Threshold(column="min_side", at_least=200),
            Threshold(column="aspect_ratio", at_most=3),
        ),
        write=Write(tars=False),
    )


def straw_men(keep_fraction: float) -> dict[str, Select]:
    """One number alone, by name, as steps of a selection. Clarity needs the columns of `jobs.fit quality`, aesthetic a
    head called `aesthetic`."""
    return {
        name: Select(method={"name": "clip_score", "column": column}, keep_fraction=keep_fraction)
        for name, column in STRAW_MEN.items()
    }


CURATE: dict[str, Callable[[], CurateRecipe]] = {
    recipe.__name__: recipe for recipe in (debug, small, medium, large, laion, basic)
}
"""Recipes of `jobs.curate`, by name."""


def _nightly(recipe: Callable[[], CurateRecipe]) -> Callable[[], NightlyRecipe]:
    return lambda: NightlyRecipe(curate=recipe())


NIGHTLY: dict[str, Callable[[], NightlyRecipe]] = {name: _nightly(recipe) for name, recipe in CURATE.items()}
"""Recipes of `jobs.nightly`, by name."""


def debug_train() -> TrainRecipe:
    """Any curated pool on a CPU: the nano model, small batches."""
    return TrainRecipe(
        name="debug",
        learner=Weights(model="nano"),
        train=Train(num_steps=100, sub_batch=64, score_batch=256, learning_rate=2e-3, warmup=0.1),
        compute=Workers(device="cpu"),
        checkpoint_every=50,
    )


def small_train() -> TrainRecipe:
    """ViT-B/32 from random weights on one GPU: JEST with b = 4,096 out of 20,480."""
    return TrainRecipe(
        name="small",
        learner=Weights(model="ViT-B-32"),
        train=Train(num_steps=30_000, sub_batch=4096, micro_batches=2),
        compute=Workers(device="cuda", feed_actors=12),
        checkpoint_every=1000,
    )


def jest_train() -> TrainRecipe:
    """JEST's own scale (arXiv:2406.17711): SigLIP ViT-B/16, b = 32,768 out of 163,840, 4 billion samples trained."""
    return TrainRecipe(
        name="jest",
        learner=Weights(model="ViT-B-16-SigLIP"),
        train=Train(num_steps=122_070, sub_batch=32_768, cooldown=0.1, floor=0.1),
        compute=Workers(device="cuda", workers=32, feed_actors=12),
        ledger=Remember(actors=8),
        checkpoint_every=1000,
    )


def flexi_train() -> TrainRecipe:
    """Flexi-JEST at JEST's scale: scored in patches of 32, half of each sub-batch trained in them (arXiv:2406.17711).

    open_clip's own ViT-B/16 in place of timm's SigLIP tower, for its patches can be resampled.
    """
    return jest_train().model_copy(
        update={
            "name": "flexi",
            "learner": Weights(model="ViT-B-16"),
            "low_resolution": LowResolution(patch_size=32),
        }
    )


def acid_finetune() -> TrainRecipe:
    """SigLIP 2's last stage (arXiv:2502.14786, Sec. 2.5): half of 65,536 rows chosen by one large reference.

    A pass over 4 billion at a learning rate of 1e-5 without weight decay; the reference's embeddings are the run's
    columns, and nothing is distilled. `learner.checkpoint` names the weights that are fine-tuned.
    """
    return TrainRecipe(
        name="acid-finetune",
        learner=Weights(model="ViT-B-16-SigLIP"),
        train=Train(num_steps=122_070, sub_batch=32_768, filter_ratio=0.5, learning_rate=1e-5, weight_decay=0.0),
        compute=Workers(device="cuda", workers=32, feed_actors=12),
        ledger=Remember(actors=8),
        checkpoint_every=1000,
    )


TRAIN: dict[str, Callable[[], TrainRecipe]] = {
    "debug": debug_train,
    "small": small_train,
    "jest": jest_train,
    "flexi": flexi_train,
    "acid-finetune": acid_finetune,
}
"""Recipes of `jobs.train`, by name."""


def _reference(recipe: TrainRecipe) -> TrainRecipe:
    """The recipe for a model that is trained on every row."""
    every_row = {"filter_ratio": 0.0}
    return recipe.model_copy(update={"method": {"name": "uniform"}, "train": recipe.train.model_copy(update=every_row)})


REFERENCE: dict[str, Callable[[], TrainRecipe]] = {
    "debug": lambda: _reference(debug_train()),
    "small": lambda: _reference(small_train()),
    "jest": lambda: _reference(jest_train()),
}
"""Recipes of `jobs.fit reference`, by name."""


def features_debug() -> FeaturesRecipe:
    """A nano model's image tower with random weights: proves the pipe."""
    return FeaturesRecipe(network=Network(model="nano"), batch_size=64, compute=Compute(device="cpu"))


def features_clip() -> FeaturesRecipe:
    """The image tower of CLIP ViT-B/32."""
    return FeaturesRecipe(
        network=Network(model="ViT-B-32", pretrained=CLIP_B32.pretrained),
        batch_size=512,
        compute=Compute(device="cuda", decode_threads=8),
    )


def features_tflite() -> FeaturesRecipe:
    """A TFLite file, one image at a time on CPUs: --network.model FILE."""
    return FeaturesRecipe(network=Network(library="tflite", model="FILE"), batch_size=1, compute=Compute(device="cpu"))


def features_phash() -> FeaturesRecipe:
    """64-bit perceptual hashes, for near duplicates by Hamming distance."""
    return FeaturesRecipe(network=Network(library="phash", model="64"), batch_size=512, compute=Compute(device="cpu"))


FEATURES: dict[str, Callable[[], FeaturesRecipe]] = {
    "debug": features_debug,
    "clip": features_clip,
    "tflite": features_tflite,
    "phash": features_phash,
}
"""Recipes of `jobs.fit features`, by name."""


def embeddings_debug() -> EmbeddingsRecipe:
    """A nano model on a CPU; --weights.checkpoint FILE names its weights."""
    return EmbeddingsRecipe(weights=Weights(model="nano"), batch_size=64, compute=Compute(device="cpu"))


def embeddings_small() -> EmbeddingsRecipe:
    """CLIP ViT-B/32 on a GPU."""
    return EmbeddingsRecipe(
        weights=Weights(model="ViT-B-32", pretrained=CLIP_B32.pretrained),
        batch_size=512,
        compute=Compute(device="cuda", decode_threads=8),
    )


QUALITY: dict[str, Callable[[], QualityRecipe]] = {
    "cpu": lambda: QualityRecipe(column="quality", compute=Compute(device="cpu"))
}
"""Recipes of `jobs.fit quality`, by name."""

EMBEDDINGS: dict[str, Callable[[], EmbeddingsRecipe]] = {"debug": embeddings_debug, "small": embeddings_small}
"""Recipes of `jobs.fit embeddings`, by name."""


def subset_debug() -> SubsetRecipe:
    """A pool that was embedded with random weights, measured on those: proves the pipe."""
    return SubsetRecipe(keep=100)


def subset_dinov2() -> SubsetRecipe:
    """Measured on a column of DINOv2 ViT-L/14, which selections on CLIP never saw."""
    return SubsetRecipe(name="dinov2", features="dinov2")


DINOV2 = Network(library="timm", model="vit_large_patch14_dinov2", pretrained="lvd142m")
SUBSET: dict[str, Callable[[], SubsetRecipe]] = {"debug": subset_debug, "dinov2": subset_dinov2}
"""Recipes of `jobs.evaluate subset`, by name."""


HELD_OUT: dict[str, Callable[[], HeldOutRecipe]] = {
    "pairs": lambda: HeldOutRecipe(name="pairs"),
    "images": lambda: HeldOutRecipe(name="images", is_of_pairs=False, label="json.class"),
}
"""Recipes of `jobs.evaluate held-out`, by name."""


def diffusion_tiny() -> DiffusionRecipe:
    """16 px, minutes on a CPU: proves the pipe. The features are random; name a network."""
    return DiffusionRecipe(
        name="tiny",
        keep=100,
        generator=Generator(
            image_size=16,
            channels=(16, 32),
            layers_per_level=1,
            attention=False,
            batch_size=16,
            sampling_steps=20,
            learning_rate=1e-3,
        ),
        steps=500,
        seeds=2,
        samples=200,
        network=Network(model="nano", seed=1),
        device="cpu",
        checkpoint_every=125,
    )


def diffusion_cifar() -> DiffusionRecipe:
    """32 px on a GPU: 1,000 images an arm, 5,000 steps of 128, three seeds (typicality.md, Sec. 5, small scale)."""
    return DiffusionRecipe(
        name="cifar",
        generator=Generator(channels=(48, 96, 192), batch_size=128, sampling_steps=50),
        steps=5_000,
        network=DINOV2,
        device="cuda",
    )


def diffusion_lightly() -> DiffusionRecipe:
    """The article's set-up: 128 px, DDPM, batch 32, 1,000 images for 20,000 steps, the full set for 20,000 and 70,000.

    What it does not say is lucidrains' default of that time: U-Net of width 64 with multiples 1, 2, 4, 8, v, sigmoid
    schedule, learning rate 1e-4, averaged weights. Distances are in the whole of DINOv2's 1,024 numbers. Deviation: the
    network is diffusers' U-Net of those sizes. The pool's own embeddings should be those of
    CLIP ViT-B/32, as `jobs.curate small` makes them.
    """
    return DiffusionRecipe(
        name="lightly",
        arms=("random", "coreset", "typicality", "full", "full-70k=full@70000"),
        straw_men=False,
        max_width=1024,
        generator=Generator(image_size=128, channels=(64, 128, 256, 512), batch_size=32, sampling_steps=250),
        steps=20_000,
        seeds=2,
        network=DINOV2,
        device="cuda",
    )


DIFFUSION: dict[str, Callable[[], DiffusionRecipe]] = {
    "tiny": diffusion_tiny,
    "cifar": diffusion_cifar,
    "lightly": diffusion_lightly,
}
"""Recipes of `jobs.evaluate diffusion`, by name."""


def mimic_majority() -> MimicRecipe:
    """Weights above their batch's mean, by majority of the rounds."""
    return MimicRecipe()


def mimic_one_coin() -> MimicRecipe:
    """The same votes by the one-coin model."""
    return MimicRecipe(aggregator="one_coin")


MIMIC: dict[str, Callable[[], MimicRecipe]] = {"majority": mimic_majority, "one_coin": mimic_one_coin}
"""Recipes of `jobs.fit mimic`, by name."""


def factors_cpu() -> FactorsRecipe:
    """A sparse autoencoder of 4 factors per feature, 16 of them per row: minutes for some ten thousand rows."""
    return FactorsRecipe(units_per_feature=4, num_active=16, batch_size=1024)


def factors_clip() -> FactorsRecipe:
    """CLIP's image embeddings: 8 factors per feature, 32 per row. Our completion of arXiv:2603.04981."""
    return FactorsRecipe(torch_threads=8, tasks=8)


FACTORS: dict[str, Callable[[], FactorsRecipe]] = {"cpu": factors_cpu, "clip": factors_clip}
"""Recipes of `jobs.fit factors`, by name."""


def rater_debug() -> RaterRecipe:
    """On the run's own embeddings, a few dozen steps: proves the pipe."""
    return RaterRecipe(
        proxy=Proxy(kind="masked", width=32, components=8),
        rater=RaterNetwork(width=32, hidden=16),
        teach=Teach(batch_size=8, epochs=4),
        device="cpu",
    )


def rater_cpu() -> RaterRecipe:
    """A rater of any features, taught by an autoregressive model of a column of pixels."""
    return RaterRecipe(name="cpu", modelled="pixels", teach=Teach(learning_rate=3e-3), device="cpu")


def rater_paper() -> RaterRecipe:
    """As printed: Eqs. 5 and 6, no group head, for with one the batch's weight collapses (and says so)."""
    return RaterRecipe(
        name="paper", modelled="pixels", rater=RaterNetwork(group=False), teach=Teach(mode="paper"), device="auto"
    )


def rater_code() -> RaterRecipe:
    """As released: a sigmoid and two softmaxes, their learning rate, batches of 2 x 32."""
    return RaterRecipe(name="code", modelled="pixels", teach=Teach(mode="code", learning_rate=1e-4), device="auto")


RATER: dict[str, Callable[[], RaterRecipe]] = {
    "debug": rater_debug,
    "cpu": rater_cpu,
    "paper": rater_paper,
    "code": rater_code,
}
"""Recipes of `jobs.fit rater`, by name."""
RATINGS: dict[str, Callable[[], RatingsRecipe]] = {"default": RatingsRecipe}
"""Recipes of `jobs.fit ratings`, by name."""
