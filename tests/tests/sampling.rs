//! What the reference host makes of its samplers: sigma space, added evaluations, runs from a picture, prompt switches.

use std::path::{Path, PathBuf};

use candle_core::{DType, Tensor};
use diffusion::Pipeline;
use diffusion::scheduler::Scheduler;
use host_api::host::Instance;
use host_api::{Run, Space, Step, Text, ViewMut};
use host_demo::{Mode, PluginChoice, PromptSwitch, Request, Rgb, RunOutcome, Session, StartImage};
use serde_json::{Value, json};
use tests::dpt::{base_model, create, host_config, model, own_config, unet_config};
use tests::hosts::plain;
use tests::{assert_close, assert_same, device, plugin_library, relative_error, values};

const PROMPT: &str = "a red circle left of a blue square";
const OTHER: &str = "five pandas are eating bamboo.";
const STEPS: usize = 6;

fn session(config: Option<Value>) -> Session {
    let plugin = config.map(|config| PluginChoice { library: plugin_library().to_owned(), config, split: false });
    Session::load(&base_model(), DType::F32, device(), plugin.as_ref()).unwrap()
}

fn request(scheduler: Scheduler) -> Request {
    let noise = (values(3, (1, 4, 16, 16)) * 1.4).unwrap();
    Request::new(vec![PROMPT.into()], scheduler, STEPS, 5., noise)
}

/// The latents after every evaluation, and what the run gave.
fn run(session: &mut Session, request: &Request) -> (Vec<Tensor>, RunOutcome) {
    let mut trail = Vec::new();
    let outcome = session.run(request, &mut |latents, _| trail.push(latents.clone())).unwrap();
    (trail, outcome)
}

/// A run with another sampler is another run, but a correction is felt in each, and only in steps' first evaluations.
#[test]
fn every_sampler_is_corrected_at_its_steps_first_evaluations() {
    for scheduler in Scheduler::ALL {
        let mut session = session(Some(host_config(json!({}))));
        let (_, corrected) = run(&mut session, &request(scheduler));
        session.set_param("eta", 0.).unwrap();
        let (_, plain) = run(&mut session, &request(scheduler));
        assert!(relative_error(&corrected.latents, &plain.latents) > 0.01, "{scheduler}");
        let outcomes: Vec<_> = corrected.steps.iter().map(|s| (s.index, s.sub_evaluation, s.outcome)).collect();
        let mut expected: Vec<_> = (0..STEPS).map(|step| (step, 0, "corrected")).collect();
        if scheduler == Scheduler::Pndm {
            expected.insert(1, (0, 1, "skipped: not the step's first evaluation"));
        }
        assert_eq!(outcomes, expected, "{scheduler}");
    }
}

/// Euler's method works on x = z / sqrt(alpha_bar), and so does the plugin there; here the same run with every correction done
/// on z by hand.
#[test]
fn a_run_in_sigma_space_is_the_run_in_variance_preserving_space() {
    for guidance in [1., 5.] {
        let request = Request { guidance, plugin_lora: false, ..request(Scheduler::Euler) };
        let found = run(&mut session(Some(host_config(json!({})))), &request).1;

        let pipeline = Pipeline::load(&base_model(), DType::F32, device()).unwrap();
        let mut plugin = by_hand(&request);
        let empty = pipeline.text.encode(&[""]).unwrap().hidden;
        let text = pipeline.text.encode(&[PROMPT]).unwrap().hidden;
        let mut sampler = Scheduler::Euler.plan(&pipeline.scheduler, STEPS, 0).unwrap();
        let mut x = (&request.noise * sampler.init_noise_sigma()).unwrap();
        for i in 0..STEPS {
            let at = sampler.evaluations()[i];
            let scale = at.alpha_bar.sqrt();
            let mut z: Vec<f32> = (&x * scale).unwrap().flatten_all().unwrap().to_vec1().unwrap();
            let step = Step {
                index: i,
                count: STEPS,
                sub_evaluation: 0,
                timestep: at.timestep,
                alpha_bar: at.alpha_bar,
                space: Space::Vp,
                extra_inputs: false,
                text: None,
            };
            let report = plugin.step_in_place(&step, &mut ViewMut::new(&mut z, x.dims()).unwrap()).unwrap();
            let (score, expected) = (found.steps[i].items[0].score.unwrap(), report.items[0].score);
            assert!((score - expected).abs() < 1e-5, "step {i}: score {score}, not {expected}");
            let z = Tensor::from_vec(z, x.shape(), device()).unwrap();
            let noise =
                |text: &Tensor| pipeline.unet.forward(&z, &[at.timestep], &pipeline.unet.text(text).unwrap()).unwrap();
            let (without, with) = (noise(&empty), noise(&text));
            let noise = (&without + ((with - &without).unwrap() * guidance).unwrap()).unwrap();
            x = sampler.step(i, &noise, &(z / scale).unwrap()).unwrap();
        }
        assert_close("final latents", &found.latents, &x, 1e-4);
    }
}

/// The plugin with its own U-Net, without the LoRA that it brings, begun for the request's prompts.
fn by_hand(request: &Request) -> Instance {
    let mut plugin = create(plain(), &own_config(json!({"lora_strength": 0}))).unwrap();
    plugin.prepare(&model(&unet_config(&base_model())), host_api::Device::Cpu).unwrap();
    let text = Text { prompts: Some(&request.prompts), ..Text::default() };
    plugin.begin(&Run { batch: 1, steps: STEPS, guidance_scale: request.guidance, text }).unwrap();
    plugin
}

fn img2img_case() -> std::collections::HashMap<String, Tensor> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("parity-more/img2img.safetensors");
    candle_core::safetensors::load(path, device()).unwrap()
}

fn picture(case: &std::collections::HashMap<String, Tensor>) -> Rgb {
    let pixels = case["pixels"].flatten_all().unwrap().to_vec1::<u8>().unwrap();
    Rgb { width: 64, height: 64, pixels }
}

/// diffusers' image-to-image loop, half of a schedule of six steps.
#[test]
fn parity_of_runs_from_a_picture() {
    let case = img2img_case();
    let mut session = session(None);
    let image = picture(&case).to_tensor(device()).unwrap().unsqueeze(0).unwrap();
    let latents = session.encode(&image).unwrap();
    assert_close("latents", &latents, &case["latents"], 1e-4);
    for (name, scheduler) in
        [("ddim", Scheduler::Ddim), ("euler", Scheduler::Euler), ("dpmpp-2m", Scheduler::DpmSolverPlusPlus2M)]
    {
        let image = Some(StartImage { latents: latents.clone(), strength: 0.5 });
        let request = Request { image, noise: case["noise"].clone(), ..request(scheduler) };
        let (trail, outcome) = run(&mut session, &request);
        assert_eq!(trail.len(), 3);
        assert_close(name, &outcome.latents, &case[&format!("{name}.final")], 1e-3);
    }
}

/// Shares of the schedule mean the same noise in a run from a picture as in one from noise alone.
#[test]
fn start_and_end_are_counted_in_schedule_time() {
    let latents = (values(5, (1, 4, 16, 16)) * 0.5).unwrap();
    for scheduler in Scheduler::ALL {
        let base = request(scheduler);
        let image = Some(StartImage { latents: latents.clone(), strength: 0.5 });
        let from_picture = Request { image, ..base.clone() };
        for (more, corrected) in [
            (json!({"start": 0.5}), [true, true, true]),
            (json!({"end": 0.5}), [false, false, false]),
            (json!({"end": 0.8}), [true, true, false]),
        ] {
            let mut session = session(Some(host_config(more.clone())));
            let of = |outcome: &RunOutcome| -> Vec<_> {
                let first = outcome.steps.iter().filter(|step| step.sub_evaluation == 0);
                first.map(|step| (step.index, step.timestep, step.outcome == "corrected")).collect()
            };
            let (whole, half) = (of(&run(&mut session, &base).1), of(&run(&mut session, &from_picture).1));
            assert_eq!(half, whole[3..], "{scheduler} {more}");
            assert!(half.iter().map(|step| step.2).eq(corrected), "{scheduler} {more}");
        }
    }
}

/// With all of the schedule run, a picture is as noisy as noise can make it, but is still in it.
#[test]
fn strength_decides_how_much_of_the_picture_is_left() {
    let case = img2img_case();
    let mut session = session(None);
    let kept = |session: &mut Session, strength| {
        let image = Some(StartImage { latents: case["latents"].clone(), strength });
        let request =
            Request { image, noise: case["noise"].clone(), guidance: 1., steps: 10, ..request(Scheduler::Ddim) };
        relative_error(&session.run(&request, &mut |_, _| {}).unwrap().latents, &case["latents"])
    };
    let distances = [0.1, 0.5, 1.].map(|strength| kept(&mut session, strength));
    assert!(distances.windows(2).all(|pair| pair[0] < pair[1]), "{distances:?}");
}

/// From the beginning on, a switch is another prompt; from the middle on, it is one for U-Net and score alike, whoever computes
/// the gradient.
#[test]
fn a_prompt_switch_counts_for_the_picture_and_for_the_score() {
    for mode in [Mode::Paper, Mode::ConditionOnly] {
        let base = Request { mode, ..request(Scheduler::Ddim) };
        let at = |from: f64| vec![PromptSwitch { from, prompt: OTHER.into() }];
        let mut host = session(Some(host_config(json!({}))));
        let other = Request { prompts: vec![OTHER.into()], ..base.clone() };
        let (first, second) = (run(&mut host, &base), run(&mut host, &other));
        let (at_once, _) = run(&mut host, &Request { switches: at(0.), ..base.clone() });
        assert_same("another prompt", &at_once[STEPS - 1], &second.0[STEPS - 1]);

        let switched = Request { switches: at(0.5), ..base.clone() };
        let (trail, outcome) = run(&mut host, &switched);
        assert_same("before the switch", &trail[2], &first.0[2]);
        assert!(relative_error(&trail[3], &first.0[3]) > 1e-3);
        let score = |outcome: &RunOutcome, step: usize| outcome.steps[step].items[0].score.unwrap();
        let rounding = if device().is_cpu() { 0. } else { 1e-6 };
        assert!((score(&outcome, 2) - score(&first.1, 2)).abs() <= rounding);
        assert!((score(&outcome, 3) - score(&first.1, 3)).abs() > 1e-4);
        let (_, own) = run(&mut session(Some(own_config(json!({})))), &switched);
        assert_close("host against plugin", &own.latents, &outcome.latents, 1e-5);
        for step in 0..STEPS {
            assert!((score(&own, step) - score(&outcome, step)).abs() < 1e-5);
        }
    }
}

#[test]
fn what_does_not_fit_a_run_is_refused() {
    let mut session = session(None);
    let base = request(Scheduler::Ddim);
    let mut refused = |request: Request, named: &str| {
        let message = session.run(&request, &mut |_, _| {}).err().unwrap().to_string();
        assert!(message.contains(named), "{message}");
    };
    refused(Request { prompts: vec![], ..base.clone() }, "0 prompts for a batch of 1");
    let latents = values(1, (1, 4, 8, 8));
    refused(Request { image: Some(StartImage { latents, strength: 0.5 }), ..base.clone() }, "[1, 4, 8, 8]");
    let latents = base.noise.clone();
    refused(Request { image: Some(StartImage { latents, strength: 0. }), ..base.clone() }, "strength 0");
    let switches = vec![PromptSwitch { from: 1.5, prompt: OTHER.into() }];
    refused(Request { switches, ..base.clone() }, "share 1.5");
    refused(Request { steps: 0, ..base }, "0 steps");
    let absent = Rgb::load_png(&PathBuf::from("absent.png")).unwrap_err().to_string();
    assert!(absent.contains("absent.png"), "{absent}");
}
