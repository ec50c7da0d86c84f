//! CLIP's text transformer: token ids to hidden states and the pooled embedding.

use std::path::Path;

use candle_core::{DType, Device, Tensor};

use super::config::{Activation, Config};
use super::layer::Layer;
use crate::config::weights_file;
use crate::layers::{LayerNorm, statistics_dtype};
use crate::{Checkpoint, Error, Result, Scope};

/// The text encoder of Stable Diffusion 1.x and 2.x, as transformers' `CLIPTextModel`.
pub struct TextEncoder {
    config: Config,
    token_embedding: Tensor,
    position_embedding: Tensor,
    layers: Vec<Layer>,
    final_norm: LayerNorm,
    mask: Tensor,
    weight_bytes: u64,
}

/// What a prompt means to the U-Net and to a matching score.
#[derive(Clone, Debug)]
pub struct TextEmbedding {
    /// `[B, S, D]`: the last hidden states after the final layer norm; the U-Net's context.
    pub hidden: Tensor,
    /// `[B, D]`: the hidden state at the end-of-text token, not projected.
    pub pooled: Tensor,
}

impl TextEncoder {
    /// Loads `config.json` and `model.safetensors` (or `model.fp16.safetensors`) of a `text_encoder` folder.
    ///
    /// Tensors may be named with the prefix `text_model.` or without. Fails when a tensor is missing, misshapen or
    /// unknown (a projection and `position_ids` may be there; neither is used), and when the activation is unknown.
    pub fn load(folder: &Path, dtype: DType, device: &Device) -> Result<Self> {
        let config = Config::load(folder)?;
        Self::from_checkpoint(Checkpoint::open(&weights_file(folder, "model")?, dtype, device)?, config)
    }

    pub(crate) fn from_checkpoint(checkpoint: Checkpoint, config: Config) -> Result<Self> {
        checkpoint.ignore("text_projection.weight");
        let root = checkpoint.root();
        let prefixed = root.enter("text_model");
        let top = if prefixed.contains("final_layer_norm.weight") { prefixed } else { root };
        checkpoint.ignore(top.enter("embeddings.position_ids").path());
        let encoder = Self::from_scope(config, &top)?;
        checkpoint.finish()?;
        Ok(encoder)
    }

    fn from_scope(config: Config, scope: &Scope) -> Result<Self> {
        let Config { hidden_size: d, max_position_embeddings: positions, layer_norm_eps: eps, .. } = config;
        let activation = Activation::named(&config.hidden_act)?;
        let embeddings = scope.enter("embeddings");
        let token_embedding = embeddings.tensor("token_embedding.weight", &[config.vocab_size, d])?;
        let position_embedding = embeddings.tensor("position_embedding.weight", &[positions, d])?;
        let layers = (0..config.num_hidden_layers)
            .map(|i| {
                let place = scope.enter("encoder.layers").enter(i);
                Layer::load(&place, d, config.intermediate_size, config.num_attention_heads, eps, activation)
            })
            .collect::<Result<_>>()?;
        let final_norm = LayerNorm::load(&scope.enter("final_layer_norm"), d, eps)?;
        let mask = causal_mask(positions, scope.device())?.to_dtype(statistics_dtype(scope.dtype()))?;
        let weight_bytes = scope.taken_bytes();
        Ok(Self { config, token_embedding, position_embedding, layers, final_norm, mask, weight_bytes })
    }

    /// Bytes of the weights.
    pub fn weight_bytes(&self) -> u64 {
        self.weight_bytes
    }

    /// D, the width of the hidden states and of the pooled embedding.
    pub fn hidden_size(&self) -> usize {
        self.config.hidden_size
    }

    /// S, the most token ids that a prompt can have.
    pub fn max_positions(&self) -> usize {
        self.config.max_position_embeddings
    }

    /// The number of attention heads in every layer.
    pub fn heads(&self) -> usize {
        self.config.num_attention_heads
    }

    /// The number of tokens that have an embedding.
    pub fn vocab_size(&self) -> usize {
        self.config.vocab_size
    }

    /// Encodes a batch of equally long id sequences, each at most [`Self::max_positions`] long.
    ///
    /// Padding is attended to like any token, as in Stable Diffusion. Fails on an empty batch, unequal lengths, an id
    /// without an embedding, and a sequence without an end-of-text token.
    pub fn encode(&self, ids: &[Vec<u32>]) -> Result<TextEmbedding> {
        let positions = self.check(ids)?;
        let ends = ids.iter().map(|ids| end_of_text(ids, self.config.eos_token_id)).collect::<Result<Vec<_>>>()?;
        let flat: Vec<u32> = ids.concat();
        let flat = Tensor::from_vec(flat, ids.len() * positions, self.token_embedding.device())?;
        let tokens = self.token_embedding.index_select(&flat, 0)?.reshape((ids.len(), positions, ()))?;
        let mut x = tokens.broadcast_add(&self.position_embedding.narrow(0, 0, positions)?)?;
        let mask = self.mask.narrow(0, 0, positions)?.narrow(1, 0, positions)?;
        for layer in &self.layers {
            x = layer.forward(&x, &mask)?;
        }
        let hidden = self.final_norm.forward(&x)?;
        let pooled = ends.iter().enumerate().map(|(row, &end)| hidden.get(row)?.get(end));
        let pooled = Tensor::stack(&pooled.collect::<candle_core::Result<Vec<_>>>()?, 0)?;
        Ok(TextEmbedding { hidden, pooled })
    }

    /// The common length of the sequences.
    fn check(&self, ids: &[Vec<u32>]) -> Result<usize> {
        let positions = ids.first().map_or(0, Vec::len);
        let longest = self.max_positions();
        if positions == 0 || positions > longest {
            let found = if ids.is_empty() { "an empty batch".to_owned() } else { format!("{positions} ids") };
            return Err(Error::Input(format!(
                "text encoder: expected 1 to {longest} token ids a prompt, found {found}"
            )));
        }
        if let Some(other) = ids.iter().find(|other| other.len() != positions) {
            let (first, other) = (positions, other.len());
            return Err(Error::Input(format!("text encoder: prompts of one batch have {first} and {other} token ids")));
        }
        if let Some(id) = ids.iter().flatten().find(|&&id| id as usize >= self.vocab_size()) {
            let size = self.vocab_size();
            return Err(Error::Input(format!("text encoder: token id {id}, but there are {size} token embeddings")));
        }
        Ok(positions)
    }
}

/// `[S, S]`, f32: 0 where a position (row) may attend to another (column), minus infinity for later ones.
fn causal_mask(positions: usize, device: &Device) -> Result<Tensor> {
    let mask = (0..positions).flat_map(|i| (0..positions).map(move |j| if j > i { f32::NEG_INFINITY } else { 0.0 }));
    Ok(Tensor::from_vec(mask.collect::<Vec<_>>(), (positions, positions), device)?)
}

/// The position that the pooled embedding is read at.
///
/// Configurations made before transformers corrected them say `eos_token_id` 2, which is never the end-of-text token:
/// for them it is the largest id, as in CLIP's original code.
fn end_of_text(ids: &[u32], eos_token_id: u32) -> Result<usize> {
    let end = if eos_token_id == 2 { ids.iter().max().copied().unwrap_or(2) } else { eos_token_id };
    ids.iter().position(|&id| id == end).ok_or_else(|| {
        Error::Input(format!("text encoder: no end-of-text token (id {end}) in a prompt of {} ids", ids.len()))
    })
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;
    use crate::testing::Folder;

    const CONFIG: &str = r#"{"vocab_size": 9, "hidden_size": 4, "intermediate_size": 6, "num_hidden_layers": 1,
        "num_attention_heads": 2, "max_position_embeddings": 5, "hidden_act": "gelu", "eos_token_id": 2}"#;

    fn weights(prefix: &str) -> HashMap<String, Tensor> {
        let mut shapes: Vec<(String, Vec<usize>)> = vec![
            ("embeddings.token_embedding.weight".into(), vec![9, 4]),
            ("embeddings.position_embedding.weight".into(), vec![5, 4]),
            ("encoder.layers.0.mlp.fc1.weight".into(), vec![6, 4]),
            ("encoder.layers.0.mlp.fc1.bias".into(), vec![6]),
            ("encoder.layers.0.mlp.fc2.weight".into(), vec![4, 6]),
            ("encoder.layers.0.mlp.fc2.bias".into(), vec![4]),
        ];
        for projection in ["q_proj", "k_proj", "v_proj", "out_proj"] {
            shapes.push((format!("encoder.layers.0.self_attn.{projection}.weight"), vec![4, 4]));
            shapes.push((format!("encoder.layers.0.self_attn.{projection}.bias"), vec![4]));
        }
        for norm in ["encoder.layers.0.layer_norm1", "encoder.layers.0.layer_norm2", "final_layer_norm"] {
            shapes.push((format!("{norm}.weight"), vec![4]));
            shapes.push((format!("{norm}.bias"), vec![4]));
        }
        // Distinct, reproducible values of either sign.
        let value = |k: usize, i: usize| (k as f32 * 1.3 + i as f32 * 2.1).sin();
        let tensor = |(k, (name, shape)): (usize, (String, Vec<usize>))| {
            let values = (0..shape.iter().product()).map(|i| value(k, i)).collect::<Vec<_>>();
            (format!("{prefix}{name}"), Tensor::from_vec(values, shape, &Device::Cpu).unwrap())
        };
        shapes.into_iter().enumerate().map(tensor).collect()
    }

    fn folder(config: &str, weights: &HashMap<String, Tensor>, file: &str) -> Folder {
        let folder = Folder::new();
        folder.write("config.json", config);
        candle_core::safetensors::save(weights, folder.path().join(file)).unwrap();
        folder
    }

    fn load(folder: &Folder, dtype: DType) -> Result<TextEncoder> {
        TextEncoder::load(folder.path(), dtype, &Device::Cpu)
    }

    fn failure(config: &str, weights: &HashMap<String, Tensor>) -> String {
        load(&folder(config, weights, "model.safetensors"), DType::F32).err().unwrap().to_string()
    }

    fn values(tensor: &Tensor) -> Vec<f32> {
        tensor.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap()
    }

    #[test]
    fn old_and_new_names_are_the_same_model() {
        let ids = [vec![7, 1, 8, 8, 8]];
        let new = load(&folder(CONFIG, &weights(""), "model.safetensors"), DType::F32).unwrap().encode(&ids).unwrap();
        let mut old = weights("text_model.");
        let anything = Tensor::zeros((1, 5), DType::I64, &Device::Cpu).unwrap();
        old.insert("text_model.embeddings.position_ids".into(), anything.clone());
        old.insert("text_projection.weight".into(), anything);
        let old = load(&folder(CONFIG, &old, "model.fp16.safetensors"), DType::F32).unwrap().encode(&ids).unwrap();
        assert_eq!(old.hidden.dims(), [1, 5, 4]);
        assert_eq!(old.pooled.dims(), [1, 4]);
        assert_eq!(values(&old.hidden), values(&new.hidden));
    }

    #[test]
    fn a_position_sees_only_earlier_ones() {
        let encoder = load(&folder(CONFIG, &weights(""), "model.safetensors"), DType::F32).unwrap();
        let a = encoder.encode(&[vec![7, 1, 3, 8, 8]]).unwrap().hidden;
        let b = encoder.encode(&[vec![7, 1, 6, 8, 8]]).unwrap().hidden;
        let rows = |t: &Tensor, start, len| values(&t.narrow(1, start, len).unwrap());
        assert_eq!(rows(&a, 0, 2), rows(&b, 0, 2));
        assert_ne!(rows(&a, 4, 1), rows(&b, 4, 1));
        let short = encoder.encode(&[vec![7, 1, 3]]).unwrap().hidden;
        let close = |(x, y): (&f32, &f32)| (x - y).abs() < 1e-6;
        assert!(rows(&a, 0, 3).iter().zip(&values(&short)).all(close), "{a} {short}");
    }

    #[test]
    fn half_precision_stays_near_full() {
        let folder = folder(CONFIG, &weights(""), "model.safetensors");
        let ids = [vec![7, 1, 3, 8, 8], vec![7, 8, 8, 8, 8]];
        let full = load(&folder, DType::F32).unwrap().encode(&ids).unwrap().hidden;
        let half = load(&folder, DType::F16).unwrap().encode(&ids).unwrap().hidden;
        assert_eq!(half.dtype(), DType::F16);
        let (full, half) = (values(&full), values(&half));
        let worst = full.iter().zip(&half).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max);
        assert!(worst < 0.02 && worst > 0.0, "largest difference {worst}");
    }

    #[test]
    fn the_pooled_position_follows_the_end_token() {
        // Old configurations: the first of the largest ids, wherever id 2 stands.
        assert_eq!(end_of_text(&[7, 2, 8, 8], 2).unwrap(), 2);
        // New ones: the first end-of-text token, even below other ids.
        assert_eq!(end_of_text(&[7, 9, 6, 6, 0], 6).unwrap(), 2);
        let message = end_of_text(&[7, 1, 0], 6).unwrap_err().to_string();
        assert!(message.contains("id 6"), "{message}");

        let encoder = load(&folder(CONFIG, &weights(""), "model.safetensors"), DType::F32).unwrap();
        let embedding = encoder.encode(&[vec![7, 2, 8, 8, 8], vec![7, 8, 0, 0, 0]]).unwrap();
        for (row, end) in [(0, 2), (1, 1)] {
            let expected = embedding.hidden.get(row).unwrap().get(end).unwrap();
            assert_eq!(values(&embedding.pooled.get(row).unwrap()), values(&expected));
        }
    }

    #[test]
    fn unfit_ids_are_refused() {
        let encoder = load(&folder(CONFIG, &weights(""), "model.safetensors"), DType::F32).unwrap();
        for (ids, named) in [
            (vec![], "an empty batch"),
            (vec![vec![]], "0 ids"),
            (vec![vec![8; 6]], "1 to 5 token ids a prompt, found 6"),
            (vec![vec![8; 4], vec![8; 3]], "4 and 3"),
            (vec![vec![8, 9]], "token id 9, but there are 9"),
        ] {
            let error = encoder.encode(&ids).unwrap_err();
            assert!(matches!(error, Error::Input(_)) && error.to_string().contains(named), "{error}");
        }
    }

    #[test]
    fn unfit_files_are_refused() {
        let config = CONFIG.replace("\"gelu\"", "\"silu\"");
        let message = failure(&config, &weights(""));
        assert!(message.contains("hidden_act `silu`") && message.contains("quick_gelu"), "{message}");

        let config = CONFIG.replace("\"num_attention_heads\": 2", "\"num_attention_heads\": 3");
        let message = failure(&config, &weights(""));
        assert!(message.contains("config.json") && message.contains("num_attention_heads 3"), "{message}");

        let mut missing = weights("");
        missing.remove("encoder.layers.0.mlp.fc2.bias");
        let message = failure(CONFIG, &missing);
        assert!(message.contains("`encoder.layers.0.mlp.fc2.bias` is missing"), "{message}");

        let mut extra = weights("");
        extra.insert("encoder.layers.1.mlp.fc2.bias".into(), Tensor::zeros(4, DType::F32, &Device::Cpu).unwrap());
        let message = failure(CONFIG, &extra);
        assert!(message.contains("`encoder.layers.1.mlp.fc2.bias`"), "{message}");

        let folder = Folder::new();
        folder.write("config.json", CONFIG);
        let message = load(&folder, DType::F32).err().unwrap().to_string();
        assert!(message.contains("`model.safetensors`") && message.contains("`model.fp16.safetensors`"), "{message}");
    }
}
