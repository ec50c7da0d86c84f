//! A complete plugin library: scales the latents by the live parameter `strength`.

use std::sync::Arc;

use host_api::plugin::{HostHandle, Latents, ParamKind, ParamSpec, Params, Plugin};
use host_api::{
    Descriptor, Device, Error, ItemReport, Model, Needs, Outcome, Prediction, Report, Result, Run, Status, Step,
};

struct Scale {
    params: Arc<Params>,
}

impl Plugin for Scale {
    const DESCRIPTOR: Descriptor = Descriptor {
        id: "scale",
        name: "Scale",
        version: "1.0.0",
        vendor: "sampler-hook",
        description: "Multiplies the latents by a number",
    };

    fn create(host: HostHandle, config: &str) -> Result<Self> {
        if !config.is_empty() {
            return Err(Error::new(Status::InvalidConfig, "this plugin takes no configuration"));
        }
        let strength = ParamSpec {
            name: "strength".into(),
            description: "What the latents are multiplied by".into(),
            unit: String::new(),
            kind: ParamKind::Float { minimum: 0.0, maximum: 4.0 },
            default: 1.0,
            live: true,
        };
        host.log(log::Level::Info, "scale: created");
        Ok(Self { params: Arc::new(Params::new(vec![strength], r#"{"type":"object","maxProperties":0}"#)?) })
    }

    fn prepare(&mut self, model: &Model<'_>, device: Device) -> Result<()> {
        if device != Device::Cpu || model.prediction == Prediction::Flow {
            return Err(Error::new(Status::Unsupported, "scale works on the CPU, for models with an alpha_bar"));
        }
        Ok(())
    }

    fn needs(&self) -> Needs {
        Needs::default()
    }

    fn begin(&mut self, _run: &Run<'_>) -> Result<()> {
        Ok(())
    }

    fn step(&mut self, _step: &Step<'_>, latents: &mut Latents<'_>, report: &mut Report) -> Result<()> {
        let strength = self.params.get_by_name("strength")? as f32;
        if strength == 1.0 {
            report.outcome = Outcome::SkippedStrength;
            return Ok(());
        }
        for (index, item) in report.items.iter_mut().enumerate() {
            let before = latents.read_item(index);
            let after: Vec<f32> = before.iter().map(|value| value * strength).collect();
            match latents.write_item(index, &after) {
                Ok(()) => item.correction_norm = norm(before.iter().map(|value| value * strength - value)),
                Err(error) => *item = ItemReport { status: error.status, ..ItemReport::default() },
            }
        }
        Ok(())
    }

    fn end(&mut self) -> Result<()> {
        Ok(())
    }

    fn memory(&self) -> u64 {
        0
    }

    fn params(&self) -> Option<Arc<Params>> {
        Some(self.params.clone())
    }
}

fn norm(values: impl Iterator<Item = f32>) -> f32 {
    values.map(|value| value * value).sum::<f32>().sqrt()
}

host_api::export_plugins!(Scale);
