//! A plugin whose configuration says how it behaves.

use std::sync::Arc;

use host_api::plugin::{HostHandle, Latents, Lora, LoraEntry, ParamKind, ParamSpec, Params, Plugin};
use host_api::{Descriptor, Device, Error, Model, Needs, Outcome, Report, Result, Run, Status, Step, View, ViewMut};

pub struct Probe {
    host: HostHandle,
    params: Arc<Params>,
    lora: Arc<Lora>,
    behaviour: String,
}

fn param(name: &str, kind: ParamKind, default: f64, live: bool) -> ParamSpec {
    ParamSpec { name: name.into(), description: format!("the {name}"), unit: "u".into(), kind, default, live }
}

pub fn params() -> Params {
    let choices = ParamKind::Choice(vec!["first".into(), "second".into()]);
    let specs = vec![
        param("amount", ParamKind::Float { minimum: -8.0, maximum: 8.0 }, 1.0, true),
        param("count", ParamKind::Integer { minimum: 0, maximum: 9 }, 3.0, false),
        param("on", ParamKind::Boolean, 0.0, true),
        param("tap", choices, 1.0, false),
    ];
    Params::new(specs, r#"{"type":"object"}"#).unwrap()
}

/// Two entries whose numbers are small integers, so that products are exact.
pub fn lora() -> Lora {
    let entry = |module: &str, rank: usize, in_features: usize, out_features: usize, scale: f64| LoraEntry {
        module: module.into(),
        rank,
        in_features,
        out_features,
        down: (0..rank * in_features).map(|i| i as f32 - 2.0).collect(),
        up: (0..out_features * rank).map(|i| 3.0 - i as f32).collect(),
        scale,
    };
    Lora::new(vec![entry("mid_block.attentions.0.to_q", 2, 3, 4, 0.5), entry("up.to_out.0", 1, 2, 2, 1.0)]).unwrap()
}

impl Plugin for Probe {
    const DESCRIPTOR: Descriptor =
        Descriptor { id: "probe", name: "Probe", version: "1", vendor: "tests", description: "" };

    fn create(host: HostHandle, config: &str) -> Result<Self> {
        match config {
            "create panics" => panic!("create, as told"),
            "create fails" => return Err(Error::new(Status::InvalidConfig, "é".repeat(400))),
            "create fails, odd" => return Err(Error::new(Status::InvalidConfig, format!("x{}", "é".repeat(400)))),
            _ => {}
        }
        Ok(Self { host, params: Arc::new(params()), lora: Arc::new(lora()), behaviour: config.into() })
    }

    fn prepare(&mut self, _model: &Model<'_>, _device: Device) -> Result<()> {
        match self.behaviour.as_str() {
            "prepare fails" => Err(Error::new(Status::InvalidData, "prepare, as told")),
            _ => Ok(()),
        }
    }

    fn needs(&self) -> Needs {
        let needs = |what: &str| self.behaviour == what;
        Needs {
            gradient: needs("gradient"),
            context: needs("context"),
            pooled: needs("pooled"),
            weights: needs("weights"),
            tap: if needs("gradient") { "mid".into() } else { String::new() },
        }
    }

    fn begin(&mut self, run: &Run<'_>) -> Result<()> {
        if let Some(prompts) = run.text.prompts {
            self.host.log(log::Level::Debug, &prompts.join("|"));
        }
        Ok(())
    }

    fn step(&mut self, step: &Step<'_>, latents: &mut Latents<'_>, report: &mut Report) -> Result<()> {
        if self.behaviour == "gradient" {
            return self.add_gradient(step, latents, report);
        }
        let amount = self.params.get_by_name("amount")? as f32;
        for index in 0..latents.shape()[0] {
            if index == 0 && self.behaviour == "first item fails" {
                report.items[0].status = Status::NonFinite;
                continue;
            }
            let sum: Vec<f32> = latents.read_item(index).iter().map(|value| value + amount).collect();
            latents.write_item(index, &sum)?;
            report.items[index].score = index as f32;
        }
        match self.behaviour.as_str() {
            "step panics" => panic!("step, as told"),
            "step fails" => return Err(Error::new(Status::Internal, "step, as told")),
            "step skips but writes" => report.outcome = Outcome::SkippedInterval,
            "second item fails" => report.items[1].status = Status::NonFinite,
            "all items fail" => report.items.iter_mut().for_each(|item| item.status = Status::NonFinite),
            "step waits" => {
                self.host.log(log::Level::Info, "waiting");
                while !self.host.cancelled() {
                    std::thread::yield_now();
                }
            }
            _ => {}
        }
        Ok(())
    }

    fn end(&mut self) -> Result<()> {
        Ok(())
    }

    fn memory(&self) -> u64 {
        77
    }

    fn params(&self) -> Option<Arc<Params>> {
        Some(self.params.clone())
    }

    fn lora(&self) -> Option<Arc<Lora>> {
        Some(self.lora.clone())
    }
}

impl Probe {
    fn add_gradient(&self, step: &Step<'_>, latents: &mut Latents<'_>, report: &mut Report) -> Result<()> {
        let gradient = self.host.gradient().expect("begin has checked");
        let mut found = latents.read();
        let mut slopes = ViewMut::new(&mut found, &latents.shape())?;
        let early = gradient.vjp(&latents.view(), &mut slopes).unwrap_err();
        assert_eq!(early.status, Status::InvalidState, "no features yet");
        let read = |view: &View<'_>| Ok((view.shape().to_vec(), view.to_vec()));
        let (shape, activation) = gradient.features(step, &latents.view(), "mid", read)?;
        if self.params.get_by_name("on")? == 1.0 {
            return Err(Error::new(Status::Internal, "the activation is left to the wrapper"));
        }
        gradient.vjp(&View::new(&activation, &shape)?, &mut slopes)?;
        for (index, slope) in found.chunks(latents.item_len()).enumerate() {
            let sum: Vec<f32> =
                latents.read_item(index).iter().zip(slope).map(|(value, slope)| value + slope).collect();
            latents.write_item(index, &sum)?;
        }
        report.items[0].gradient_norm = found.iter().map(|value| value * value).sum::<f32>().sqrt();
        Ok(())
    }
}

impl Drop for Probe {
    fn drop(&mut self) {
        if self.behaviour == "drop panics" {
            panic!("drop, as told");
        }
        self.host.log(log::Level::Trace, "dropped");
    }
}

host_api::plugin_list!(pub struct Probes: Probe);
