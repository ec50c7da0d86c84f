"""Makes schedulers.json: diffusers' samplers over the settings that scheduler_config.json can hold.

    pip install torch diffusers
    python make_schedulers.py

Every case pushes the same model output, `output`, through each step from `start` (in the sampler's own space, not scaled
further), as the tests do. `first` is the step that a run from a noised image starts at; `noised` is what add_noise makes of
`start` as the image and `output` as the noise there.
"""
import json
import pathlib

import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, PNDMScheduler

BETAS = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000)
START, OUTPUT = [0.5, -1.25, 2.0], [0.3, 0.9, -1.1]
SPACINGS = ["leading", "trailing", "linspace"]
PREDICTIONS = ["epsilon", "v_prediction"]


def cases():
    for spacing in SPACINGS:
        for prediction in PREDICTIONS:
            common = dict(BETAS, timestep_spacing=spacing, prediction_type=prediction, steps_offset=1)
            ddim = dict(common, clip_sample=False)
            for steps in (1, 7, 20):
                yield DDIMScheduler, dict(ddim, set_alpha_to_one=False), steps, 0
                yield EulerDiscreteScheduler, common, steps, 0
                yield DPMSolverMultistepScheduler, common, steps, 0
                if steps > 1:
                    yield PNDMScheduler, dict(common, skip_prk_steps=True), steps, 0
            yield DDIMScheduler, dict(ddim, set_alpha_to_one=True), 7, 0
            yield PNDMScheduler, dict(common, skip_prk_steps=True, set_alpha_to_one=True), 7, 0
            for final in ("zero", "sigma_min"):
                yield EulerDiscreteScheduler, dict(common, final_sigmas_type=final), 7, 0
                yield DPMSolverMultistepScheduler, dict(common, final_sigmas_type=final), 7, 0
            # Without the first-order last step, and in a run too long for it.
            least = dict(common, final_sigmas_type="sigma_min")
            yield DPMSolverMultistepScheduler, dict(least, lower_order_final=False), 7, 0
            yield DPMSolverMultistepScheduler, least, 20, 0
            yield DPMSolverMultistepScheduler, dict(least, euler_at_final=True), 20, 0
            yield DPMSolverMultistepScheduler, dict(common, solver_type="heun"), 7, 0
            for cls in (DDIMScheduler, EulerDiscreteScheduler, DPMSolverMultistepScheduler):
                yield cls, ddim if cls is DDIMScheduler else common, 10, 6
    # Defaults of each class, from a file that says nothing of them.
    yield DDIMScheduler, dict(BETAS, clip_sample=False, steps_offset=1), 7, 0
    yield EulerDiscreteScheduler, dict(BETAS, steps_offset=1), 7, 0
    yield PNDMScheduler, dict(BETAS, steps_offset=1, skip_prk_steps=True), 7, 0
    yield DPMSolverMultistepScheduler, dict(BETAS, steps_offset=1), 7, 0
    for cls in (EulerDiscreteScheduler, DPMSolverMultistepScheduler):
        zero_snr = dict(BETAS, rescale_betas_zero_snr=True, timestep_spacing="trailing", prediction_type="v_prediction")
        yield cls, dict(zero_snr, steps_offset=1), 7, 0


def run(cls, config, steps, first):
    s = cls(**config)
    s.set_timesteps(steps)
    start, output = torch.tensor(START), torch.tensor(OUTPUT)
    timesteps = s.timesteps[first:]
    case = dict(config={"_class_name": cls.__name__, **config}, steps=steps, first=first)
    if first:
        if hasattr(s, "set_begin_index"):
            s.set_begin_index(first)
        case["noised"] = s.add_noise(start[None], output[None], timesteps[:1])[0].tolist()
    z, trail, inputs = start, [], []
    for t in timesteps:
        inputs.append(s.scale_model_input(z, t).tolist())
        z = s.step(output, t, z).prev_sample
        trail.append(z.tolist())
    case.update(timesteps=timesteps.double().tolist(), init_noise_sigma=float(s.init_noise_sigma), inputs=inputs,
                latents=trail)
    return case


if __name__ == "__main__":
    out = pathlib.Path(__file__).parent / "schedulers.json"
    made = [json.dumps(run(*case)) for case in cases()]
    head = f'{{"start": {START}, "output": {OUTPUT}, "cases": [\n'
    out.write_text(head + ",\n".join(made) + "\n]}\n")
    print(f"{out}: {len(made)} cases")
