//! A diffusers folder as one file under LDM's names.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::Path;

use candle_core::{DType, Device};

use super::names::Names;
use crate::checkpoint::RawTensor;
use crate::config::weights_file;
use crate::save::save_safetensors;
use crate::text::TextConfig;
use crate::{Checkpoint, Error, Result, UNetConfig, VaeConfig};

/// Writes U-Net, autoencoder and text encoder of a diffusers folder to the file `out`, every tensor in the type that it has. A
/// model with linear projections (SD 2) gets OpenCLIP's names for its text encoder. The file appears whole or not at all;
/// `progress` is told how many tensors of how many are read.
pub fn write_single_file(folder: &Path, out: &Path, progress: &mut dyn FnMut(usize, usize)) -> Result<()> {
    let part = |name: &str, stem: &str| -> Result<Checkpoint> {
        Checkpoint::open(&weights_file(&folder.join(name), stem)?, DType::F32, &Device::Cpu)
    };
    let unet = part("unet", "diffusion_pytorch_model")?;
    let vae = part("vae", "diffusion_pytorch_model")?;
    let text = part("text_encoder", "model")?;
    let config = UNetConfig::load(&folder.join("unet/config.json"))?;
    let vae_config = VaeConfig::load(&folder.join("vae/config.json"))?;
    let text_config = TextConfig::load(&folder.join("text_encoder"))?;
    let mut tensors = BTreeMap::new();
    let total = unet.names().len() + vae.names().len() + text.names().len();
    let mut add = |tensors: &mut BTreeMap<String, RawTensor<'_>>| progress(tensors.len(), total);

    rename(&unet, &Names::unet(&config), &mut tensors, |_, tensor| tensor)?;
    add(&mut tensors);
    rename(&vae, &Names::vae(&vae_config), &mut tensors, |name, mut tensor| {
        // The attention's projections are 1x1 convolutions there.
        if let (true, [rows, columns]) = (name.contains(".attn_1.") && name.ends_with(".weight"), &tensor.shape[..]) {
            tensor.shape = vec![*rows, *columns, 1, 1];
        }
        tensor
    })?;
    add(&mut tensors);
    match config.use_linear_projection {
        true => open_clip(&text, &text_config, &mut tensors)?,
        false => clip(&text, &mut tensors)?,
    }
    add(&mut tensors);
    save_safetensors(out, tensors, BTreeMap::from([("format".to_owned(), "pt".to_owned())]))
}

fn rename<'a>(
    part: &'a Checkpoint,
    names: &Names,
    tensors: &mut BTreeMap<String, RawTensor<'a>>,
    change: impl Fn(&str, RawTensor<'a>) -> RawTensor<'a>,
) -> Result<()> {
    for name in part.names() {
        let ldm = names.to_ldm(&name).ok_or_else(|| no_place(part, &name))?;
        let tensor = change(&ldm, part.raw(&name)?);
        tensors.insert(ldm, tensor);
    }
    Ok(())
}

fn no_place(part: &Checkpoint, name: &str) -> Error {
    Error::file(part.path(), format!("tensor `{name}` has no place in a single file"))
}

/// A text encoder's tensors by transformers' names without the prefix `text_model.`; what a single file has no use for is left
/// out.
fn text_names(text: &Checkpoint) -> impl Iterator<Item = (String, String)> {
    let short = |name: String| {
        let short = name.strip_prefix("text_model.").unwrap_or(&name).to_owned();
        (short, name)
    };
    text.names().into_iter().map(short).filter(|(short, _)| short != "text_projection.weight")
}

fn clip<'a>(text: &'a Checkpoint, tensors: &mut BTreeMap<String, RawTensor<'a>>) -> Result<()> {
    let names = Names::clip();
    for (short, name) in text_names(text) {
        tensors.insert(names.to_ldm(&short).ok_or_else(|| no_place(text, &name))?, text.raw(&name)?);
    }
    Ok(())
}

fn open_clip<'a>(
    text: &'a Checkpoint,
    config: &TextConfig,
    tensors: &mut BTreeMap<String, RawTensor<'a>>,
) -> Result<()> {
    let names = Names::open_clip(config.num_hidden_layers);
    let full: BTreeMap<String, String> = text_names(text).collect();
    for (short, name) in full.iter().filter(|(short, _)| *short != "embeddings.position_ids") {
        let projection = ["q_proj", "k_proj", "v_proj"]
            .iter()
            .find(|projection| short.contains(&format!(".self_attn.{projection}.")));
        let Some(projection) = projection else {
            tensors.insert(names.to_ldm(short).ok_or_else(|| no_place(text, name))?, text.raw(name)?);
            continue;
        };
        if *projection == "q_proj" {
            let part = |other: &str| {
                let wanted = short.replace("q_proj", other);
                let found = full
                    .get(&wanted)
                    .ok_or_else(|| Error::file(text.path(), format!("tensor `{wanted}` is missing")))?;
                text.raw(found)
            };
            let fused = fuse(text, &[part("q_proj")?, part("k_proj")?, part("v_proj")?])?;
            // encoder.layers.0.self_attn.q_proj.weight: the layer, and which tensor of the projection.
            let (layer, tensor) = short.split_once(".self_attn.q_proj.").ok_or_else(|| no_place(text, name))?;
            let ldm = names.to_ldm(&format!("{layer}.attn.in_proj_{tensor}")).ok_or_else(|| no_place(text, name))?;
            tensors.insert(ldm, fused);
        }
    }
    Ok(())
}

/// Query, key and value, one below the other.
fn fuse<'a>(text: &Checkpoint, parts: &[RawTensor<'_>; 3]) -> Result<RawTensor<'a>> {
    let first = &parts[0];
    if parts.iter().any(|part| part.shape != first.shape || part.dtype != first.dtype) || first.shape.is_empty() {
        let shapes = parts.each_ref().map(|part| (part.dtype, part.shape.clone()));
        return Err(Error::file(text.path(), format!("query, key and value differ: {shapes:?}")));
    }
    let mut shape = first.shape.clone();
    shape[0] *= 3;
    let data: Vec<u8> = parts.iter().flat_map(|part| part.data.iter().copied()).collect();
    Ok(RawTensor { dtype: first.dtype, shape, data: Cow::Owned(data) })
}
