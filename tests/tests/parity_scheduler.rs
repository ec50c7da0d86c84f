//! The samplers against diffusers: fixed sequences of model outputs, the latents after every step.

use std::path::Path;

use candle_core::{DType, Tensor};
use diffusion::scheduler::{Prediction, Sampler, Scheduler, SchedulerConfig, Space};
use serde::Deserialize;
use serde_json::Value;
use tests::dpt::scratch;
use tests::{assert_close, case, device, parity};

/// The configuration of the cases: that of the tiny pipelines, and each class's own spacing.
fn config(prediction: Prediction, own_spacing: bool) -> SchedulerConfig {
    let config = SchedulerConfig::load(&parity("sd1-tiny/scheduler")).unwrap();
    let spacing = if own_spacing { None } else { config.spacing };
    SchedulerConfig { prediction, spacing, ..config }
}

fn timesteps(sampler: &dyn Sampler) -> Vec<f64> {
    sampler.evaluations().iter().map(|evaluation| evaluation.timestep).collect()
}

#[test]
fn parity_of_every_sampler() {
    let case = case("schedulers.safetensors");
    for (name, scheduler, prediction) in [
        ("ddim", Scheduler::Ddim, Prediction::Epsilon),
        ("ddim_v", Scheduler::Ddim, Prediction::Velocity),
        ("euler", Scheduler::Euler, Prediction::Epsilon),
        ("pndm", Scheduler::Pndm, Prediction::Epsilon),
        ("dpmpp_2m", Scheduler::DpmSolverPlusPlus2M, Prediction::Epsilon),
    ] {
        let expected = &case[&format!("{name}.latents")];
        let mut sampler = scheduler.plan(&config(prediction, true), 10, 0).unwrap();
        let found = Tensor::new(timesteps(&*sampler), device()).unwrap();
        assert_close(&format!("{name} timesteps"), &found, &case[&format!("{name}.timesteps")], 1e-6);
        let sigma = case[&format!("{name}.init_noise_sigma")].to_scalar::<f32>().unwrap();
        assert!((sampler.init_noise_sigma() / f64::from(sigma) - 1.).abs() < 1e-6);

        let mut z = (&case["start"] * sampler.init_noise_sigma()).unwrap();
        for i in 0..sampler.evaluations().len() {
            let input = case[&format!("{name}.scaled_input")].get(i).unwrap();
            assert_close(&format!("{name} input {i}"), &sampler.model_input(i, &z).unwrap(), &input, 1e-4);
            z = sampler.step(i, &case["outputs"].get(i).unwrap(), &z).unwrap();
            assert_close(&format!("{name} step {i}"), &z, &expected.get(i).unwrap(), 1e-4);
        }
        assert_eq!(sampler.evaluations().len(), expected.dim(0).unwrap());
    }
}

/// PNDM's first step is evaluated at both of its ends; every other sampler evaluates once.
#[test]
fn only_a_steps_first_evaluation_is_its_own() {
    for scheduler in Scheduler::ALL {
        for first in [0, 3] {
            let sampler = scheduler.plan(&config(Prediction::Epsilon, false), 10, first).unwrap();
            let places: Vec<_> = sampler.evaluations().iter().map(|e| (e.step, e.sub_evaluation)).collect();
            let mut expected: Vec<_> = (first..10).map(|step| (step, 0)).collect();
            if scheduler == Scheduler::Pndm {
                expected.insert(1, (first, 1));
            }
            assert_eq!(places, expected, "{scheduler}");
        }
    }
}

#[derive(Deserialize)]
struct Cases {
    start: [f32; 3],
    output: [f32; 3],
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    config: Value,
    steps: usize,
    first: usize,
    timesteps: Vec<f64>,
    init_noise_sigma: f64,
    inputs: Vec<[f32; 3]>,
    latents: Vec<[f32; 3]>,
    noised: Option<[f32; 3]>,
}

fn row(values: [f32; 3]) -> Tensor {
    Tensor::new(&values, device()).unwrap()
}

/// Every setting that a configuration file can hold; see `parity-more/make_schedulers.py`.
#[test]
fn parity_of_every_setting() {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("parity-more/schedulers.json");
    let Cases { start, output, cases } = serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap();
    let folder = scratch("parity_scheduler_settings");
    let mut seen = [0; 4];
    for case in cases {
        let what = format!("{} {} steps from {}", case.config, case.steps, case.first);
        std::fs::write(folder.join("scheduler_config.json"), case.config.to_string()).unwrap();
        let config = SchedulerConfig::load(&folder).unwrap();
        let scheduler = config.scheduler.unwrap();
        seen[scheduler as usize] += 1;
        let mut sampler = scheduler.plan(&config, case.steps, case.first).unwrap_or_else(|e| panic!("{what}: {e}"));
        let found = timesteps(&*sampler);
        let same = |(found, expected): (&f64, &f64)| (found - expected).abs() < 1e-4;
        assert!(
            found.len() == case.timesteps.len() && found.iter().zip(&case.timesteps).all(same),
            "{what}: {found:?} is not {:?}",
            case.timesteps
        );
        assert!((sampler.init_noise_sigma() / case.init_noise_sigma - 1.).abs() < 1e-5, "{what}");
        if let Some(noised) = case.noised {
            assert_close(&what, &sampler.add_noise(&row(start), &row(output)).unwrap(), &row(noised), 1e-5);
        }
        let mut z = row(start);
        for (i, (input, latents)) in case.inputs.iter().zip(&case.latents).enumerate() {
            assert_close(&format!("{what}, input {i}"), &sampler.model_input(i, &z).unwrap(), &row(*input), 1e-4);
            z = sampler.step(i, &row(output), &z).unwrap();
            assert_close(&format!("{what}, step {i}"), &z, &row(*latents), 1e-4);
        }
    }
    assert!(seen.iter().all(|count| *count > 15), "{seen:?}");
}

/// A model that says the truth about the image is followed to it: by every sampler, from every step, in either space.
#[test]
fn the_true_noise_leads_to_the_image() {
    let (image, noise) = (row([0.3, -0.7, 1.1]), row([1.2, 0.1, -0.8]));
    for scheduler in Scheduler::ALL {
        for first in [0, 4, 9] {
            let config = SchedulerConfig { set_alpha_to_one: Some(true), ..config(Prediction::Epsilon, false) };
            let mut sampler = scheduler.plan(&config, 10, first).unwrap();
            let mut z = sampler.add_noise(&image, &noise).unwrap();
            for i in 0..sampler.evaluations().len() {
                z = sampler.step(i, &noise, &z).unwrap();
            }
            assert_close(&format!("{scheduler} from {first}"), &z, &image, 1e-5);
        }
    }
}

#[test]
fn samplers_keep_the_latents_precision() {
    let case = case("schedulers.safetensors");
    let wide = |t: &Tensor| t.to_dtype(DType::F64).unwrap();
    for scheduler in Scheduler::ALL {
        let mut sampler = scheduler.plan(&config(Prediction::Epsilon, false), 10, 0).unwrap();
        for i in 0..3 {
            let z = sampler.step(i, &case["outputs"].get(0).unwrap(), &wide(&case["start"])).unwrap();
            assert_eq!(z.dtype(), DType::F64, "{scheduler}");
        }
    }
    let mut ddim = Scheduler::Ddim.plan(&config(Prediction::Epsilon, false), 10, 0).unwrap();
    let z = ddim.step(0, &case["outputs"].get(0).unwrap(), &wide(&case["start"])).unwrap();
    assert_close("first step in f64", &z, &wide(&case["ddim.latents"].get(0).unwrap()), 1e-4);
}

#[test]
fn what_a_sampler_cannot_do_is_named() {
    let folder = scratch("parity_scheduler_refusals");
    let refused = |scheduler: Scheduler, more: Value, named: &str| {
        let mut config: Value =
            serde_json::from_slice(&std::fs::read(parity("sd1-tiny/scheduler/scheduler_config.json")).unwrap())
                .unwrap();
        config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        std::fs::write(folder.join("scheduler_config.json"), config.to_string()).unwrap();
        let config = SchedulerConfig::load(&folder).unwrap();
        let message = scheduler.plan(&config, 10, 0).err().unwrap_or_else(|| panic!("{scheduler} {more}")).to_string();
        assert!(message.contains(named), "{message}");
        // Where another sampler does not read the key, it does not mind.
        if scheduler != Scheduler::Ddim {
            Scheduler::Ddim.plan(&config, 10, 0).unwrap();
        }
    };
    use serde_json::json;
    for key in ["use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"] {
        refused(Scheduler::Euler, json!({key: true}), key);
        refused(Scheduler::DpmSolverPlusPlus2M, json!({key: true}), key);
    }
    for key in ["use_lu_lambdas", "use_flow_sigmas"] {
        refused(Scheduler::DpmSolverPlusPlus2M, json!({key: true}), key);
    }
    refused(Scheduler::Euler, json!({"interpolation_type": "log_linear"}), "`log_linear`");
    refused(Scheduler::Euler, json!({"timestep_type": "continuous"}), "`continuous`");
    refused(Scheduler::Pndm, json!({"skip_prk_steps": false}), "skip_prk_steps");
    refused(Scheduler::DpmSolverPlusPlus2M, json!({"solver_order": 3}), "solver_order 3");
    refused(Scheduler::DpmSolverPlusPlus2M, json!({"algorithm_type": "sde-dpmsolver++"}), "`sde-dpmsolver++`");
    refused(Scheduler::DpmSolverPlusPlus2M, json!({"variance_type": "learned"}), "`learned`");
    refused(Scheduler::DpmSolverPlusPlus2M, json!({"lambda_min_clipped": -5.1}), "-5.1");
    // PNDM divides by the alpha_bar of where it starts.
    refused(
        Scheduler::Pndm,
        json!({"rescale_betas_zero_snr": true, "timestep_spacing": "trailing", "prediction_type": "v_prediction"}),
        "alpha_bar is 0 at timestep 999",
    );
    for scheduler in Scheduler::ALL {
        let plan = |steps, first| scheduler.plan(&config(Prediction::Epsilon, false), steps, first).err().unwrap();
        assert!(plan(0, 0).to_string().contains("step"), "{scheduler}");
        assert!(plan(1001, 0).to_string().contains("1001 steps"), "{scheduler}");
        assert!(plan(10, 10).to_string().contains("step 10 of 10"), "{scheduler}");
        let mut sampler = scheduler.plan(&config(Prediction::Epsilon, false), 4, 0).unwrap();
        let past = sampler.step(5, &row([0.; 3]), &row([0.; 3])).unwrap_err().to_string();
        assert!(past.contains("evaluation 5 of a run of"), "{past}");
        assert_eq!(sampler.space() == Space::Sigma, scheduler == Scheduler::Euler);
    }
}
