"""Imported once by the server that the scripts of the tests are forked from: the project, and what libraries
import only when it is first used."""

import diffusers
import open_clip
import peft
import transformers

import evaluate
import rewards.clip_model
import train

USED = (diffusers.AutoencoderKL, diffusers.FluxPipeline, diffusers.FluxTransformer2DModel,
        diffusers.FlowMatchEulerDiscreteScheduler, transformers.CLIPTextModel, transformers.CLIPTokenizerFast,
        transformers.T5EncoderModel, transformers.T5TokenizerFast, diffusers.Flux2KleinPipeline,
        diffusers.Flux2Transformer2DModel, diffusers.AutoencoderKLFlux2, transformers.Qwen3ForCausalLM, open_clip,
        peft, evaluate, train,
        rewards.clip_model)
