//! What PEFT keeps in the header of a safetensors file instead of in tensors: rank and alpha of the U-Net's modules.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use crate::{Checkpoint, Error, Result};

/// The header entry that diffusers writes.
pub const PEFT_METADATA: &str = "lora_adapter_metadata";

/// The U-Net's part of a header's `lora_adapter_metadata`. The default says nothing: alpha is the rank.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct PeftMetadata {
    /// `lora_alpha`: of every module that no pattern names.
    alpha: Option<f64>,
    /// `alpha_pattern`: the ends of modules' paths, and their alphas.
    patterns: BTreeMap<String, f64>,
    /// `use_rslora`: the scale is alpha / sqrt(rank).
    rank_stabilized: bool,
}

impl PeftMetadata {
    /// Reads the header of a checkpoint; other files say nothing. Fails when the entry is not what PEFT writes, and on DoRA.
    pub fn of(checkpoint: &Checkpoint) -> Result<Self> {
        Self::of_texts(&checkpoint.metadata()?).map_err(|message| Error::file(checkpoint.path(), message))
    }

    /// The same from a header's texts.
    pub fn of_texts(metadata: &BTreeMap<String, String>) -> std::result::Result<Self, String> {
        let parse = |text: &String| Self::parse(text).map_err(|e| format!("the header's `{PEFT_METADATA}`: {e}"));
        metadata.get(PEFT_METADATA).map_or_else(|| Ok(Self::default()), parse)
    }

    /// Keys have the prefix `unet.` where the file is for a whole pipeline.
    fn parse(text: &str) -> std::result::Result<Self, String> {
        let entry: BTreeMap<String, Value> = serde_json::from_str(text).map_err(|e| e.to_string())?;
        let get =
            |key: &str| entry.get(&format!("unet.{key}")).or_else(|| entry.get(key)).filter(|value| !value.is_null());
        let number = |key: &str, value: &Value| {
            value.as_f64().filter(|v| v.is_finite()).ok_or_else(|| format!("`{key}` is {value}, expected a number"))
        };
        if get("use_dora").and_then(Value::as_bool) == Some(true) {
            return Err("`use_dora`: DoRA is not supported".into());
        }
        let patterns = match get("alpha_pattern") {
            None => BTreeMap::new(),
            Some(Value::Object(patterns)) => {
                let pattern = |(name, value): (&String, &Value)| Ok((name.clone(), number("alpha_pattern", value)?));
                patterns.iter().map(pattern).collect::<std::result::Result<_, String>>()?
            }
            Some(other) => return Err(format!("`alpha_pattern` is {other}, expected an object")),
        };
        Ok(Self {
            alpha: get("lora_alpha").map(|value| number("lora_alpha", value)).transpose()?,
            patterns,
            rank_stabilized: get("use_rslora").and_then(Value::as_bool).unwrap_or(false),
        })
    }

    /// The entry for modules of the U-Net, each with its path, rank and alpha: diffusers takes alpha from it alone.
    pub fn entry(modules: &[(String, usize, f64)]) -> String {
        let map = |value: &dyn Fn(&(String, usize, f64)) -> Value| -> Value {
            Value::Object(modules.iter().map(|module| (module.0.clone(), value(module))).collect())
        };
        let (rank, alpha) = modules.first().map_or((1, 1.), |(_, rank, alpha)| (*rank, *alpha));
        json!({
            "unet.peft_type": "LORA",
            "unet.r": rank,
            "unet.lora_alpha": alpha,
            "unet.rank_pattern": map(&|module| json!(module.1)),
            "unet.alpha_pattern": map(&|module| json!(module.2)),
            "unet.target_modules": modules.iter().map(|module| &module.0).collect::<Vec<_>>(),
        })
        .to_string()
    }

    /// alpha / rank, or alpha / sqrt(rank), of a module that has no alpha of its own in the file.
    pub fn scale(&self, module: &str, rank: usize) -> f64 {
        let ends = |pattern: &str| {
            module.strip_suffix(pattern).is_some_and(|before| before.is_empty() || before.ends_with('.'))
        };
        let named = self.patterns.iter().find(|(pattern, _)| ends(pattern)).map(|(_, alpha)| *alpha);
        let rank = rank as f64;
        let divisor = if self.rank_stabilized { rank.sqrt() } else { rank };
        named.or(self.alpha).map_or(1., |alpha| alpha / divisor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn alpha_is_the_modules_the_files_or_the_rank() {
        let metadata = PeftMetadata::parse(
            r#"{"unet.r": 4, "unet.lora_alpha": 6, "unet.alpha_pattern": {"attn1.to_q": 1}, "unet.use_rslora": false}"#,
        )
        .unwrap();
        assert_eq!(metadata.scale("mid_block.attn2.to_q", 4), 1.5);
        assert_eq!(metadata.scale("mid_block.attn1.to_q", 4), 0.25);
        assert_eq!(metadata.scale("mid_block.myattn1.to_q", 4), 1.5);
        assert_eq!(PeftMetadata::default().scale("a.to_q", 4), 1.);
        let stabilized = PeftMetadata::parse(r#"{"lora_alpha": 6, "use_rslora": true}"#).unwrap();
        assert_eq!(stabilized.scale("a.to_q", 4), 3.);
    }

    #[test]
    fn an_entry_is_read_back() {
        let modules = [("a.to_q".to_owned(), 2, 6.), ("b.to_out.0".to_owned(), 4, 0.5)];
        let metadata = PeftMetadata::parse(&PeftMetadata::entry(&modules)).unwrap();
        assert_eq!((metadata.scale("a.to_q", 2), metadata.scale("b.to_out.0", 4)), (3., 0.125));
    }

    #[test]
    fn what_is_no_metadata_is_refused() {
        for (text, named) in [
            ("[]", "expected a map"),
            (r#"{"unet.lora_alpha": "6"}"#, "`lora_alpha` is \"6\""),
            (r#"{"unet.alpha_pattern": 3}"#, "`alpha_pattern` is 3"),
            (r#"{"unet.use_dora": true}"#, "DoRA"),
        ] {
            let message = PeftMetadata::parse(text).unwrap_err();
            assert!(message.contains(named), "{message}");
        }
    }
}
