//! The special tokens of a tokenizer folder, wherever its generation of files keeps them.

use std::collections::BTreeMap;
use std::path::Path;

use serde::Deserialize;
use tokenizers::AddedToken;

use super::clip_vocabulary::{END, START};
use crate::Result;
use crate::config::read_json;

/// Start, end, unknown and padding token, with how each is recognised inside a prompt.
pub(super) struct SpecialTokens {
    pub bos: AddedToken,
    pub eos: AddedToken,
    pub unk: AddedToken,
    pub pad: AddedToken,
    /// Tokens that `added_tokens_decoder` registers, by id.
    pub added: Vec<(u32, AddedToken)>,
    /// `model_max_length`: infinite when absent, and astronomical in old folders that never set it.
    pub model_max_length: f64,
}

impl SpecialTokens {
    /// CLIP's own, with that padding token.
    pub fn clip(pad: &str) -> Self {
        let token = |text: &str| AddedToken::from(text.to_owned(), true);
        Self {
            bos: token(START),
            eos: token(END),
            unk: token(END),
            pad: token(pad),
            added: Vec::new(),
            model_max_length: f64::INFINITY,
        }
    }

    /// Reads `tokenizer_config.json` and, if there is one, `special_tokens_map.json`.
    ///
    /// As in transformers, the map overrides the configuration (SD 2's padding token `!` stands only there), unless the
    /// configuration has an `added_tokens_decoder`: then the map is a left-over that nobody reads.
    pub fn read(folder: &Path) -> Result<Self> {
        let config: Config = read_json(&folder.join("tokenizer_config.json"))?;
        let map_path = folder.join("special_tokens_map.json");
        let map: Names = match config.added_tokens_decoder {
            None if map_path.is_file() => read_json(&map_path)?,
            _ => Names::default(),
        };
        let added: Vec<_> = config.added_tokens_decoder.unwrap_or_default().into_iter().collect();
        let choose = |from_map: Option<Token>, from_config: Option<Token>, default: &str| {
            let token = from_map.or(from_config).unwrap_or_else(|| Token::Text(default.to_owned())).special();
            added.iter().find(|(_, other)| other.content() == token.content).map_or(token, |(_, t)| t.clone().special())
        };
        let Names { bos_token, eos_token, unk_token, pad_token } = config.names;
        Ok(Self {
            bos: choose(map.bos_token, bos_token, START),
            eos: choose(map.eos_token, eos_token, END),
            unk: choose(map.unk_token, unk_token, END),
            pad: choose(map.pad_token, pad_token, END),
            added: added.into_iter().map(|(id, token)| (id, token.special())).collect(),
            model_max_length: config.model_max_length.unwrap_or(f64::INFINITY),
        })
    }
}

/// `tokenizer_config.json`.
#[derive(Deserialize)]
struct Config {
    model_max_length: Option<f64>,
    #[serde(default)]
    added_tokens_decoder: Option<BTreeMap<u32, Token>>,
    #[serde(flatten)]
    names: Names,
}

/// The part that both files have. An absent or null token is CLIP's own.
#[derive(Default, Deserialize)]
struct Names {
    bos_token: Option<Token>,
    eos_token: Option<Token>,
    unk_token: Option<Token>,
    pad_token: Option<Token>,
}

#[derive(Clone, Deserialize)]
#[serde(untagged, expecting = "a special token must be a string or an object with a string `content`")]
enum Token {
    Text(String),
    Full {
        content: String,
        #[serde(default)]
        single_word: bool,
        #[serde(default)]
        lstrip: bool,
        #[serde(default)]
        rstrip: bool,
        #[serde(default)]
        normalized: bool,
    },
}

impl Token {
    fn content(&self) -> &str {
        match self {
            Self::Text(content) | Self::Full { content, .. } => content,
        }
    }

    fn special(self) -> AddedToken {
        match self {
            Self::Text(content) => AddedToken::from(content, true),
            Self::Full { content, single_word, lstrip, rstrip, normalized } => {
                AddedToken { content, single_word, lstrip, rstrip, normalized, special: true }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Folder;

    fn pad(config: &str, map: Option<&str>) -> AddedToken {
        let folder = Folder::new();
        folder.write("tokenizer_config.json", config);
        if let Some(map) = map {
            folder.write("special_tokens_map.json", map);
        }
        SpecialTokens::read(folder.path()).unwrap().pad
    }

    #[test]
    fn the_map_overrides_the_configuration_unless_that_lists_added_tokens() {
        let config = r#"{"pad_token": "<|endoftext|>"}"#;
        assert_eq!(pad(config, None).content, "<|endoftext|>");
        assert_eq!(pad(config, Some(r#"{"pad_token": "!"}"#)).content, "!");
        let config =
            r#"{"pad_token": "<|pad|>", "added_tokens_decoder": {"7": {"content": "<|pad|>", "normalized": true}}}"#;
        let token = pad(config, Some(r#"{"pad_token": "!"}"#));
        assert_eq!((token.content.as_str(), token.normalized), ("<|pad|>", true));
    }

    #[test]
    fn tokens_are_strings_or_objects() {
        let object =
            r#"{"pad_token": {"__type": "AddedToken", "content": "<|pad|>", "lstrip": true, "normalized": true}}"#;
        let token = pad(object, None);
        assert_eq!((token.content.as_str(), token.lstrip, token.rstrip), ("<|pad|>", true, false));
        assert!(token.normalized && token.special);
        assert!(!pad(r#"{"pad_token": "!"}"#, None).normalized, "a plain special token matches the prompt as typed");
        assert_eq!(pad(r#"{"pad_token": null}"#, None).content, "<|endoftext|>");
    }

    #[test]
    fn a_token_of_another_type_is_refused() {
        let folder = Folder::new();
        folder.write("tokenizer_config.json", r#"{"pad_token": 3}"#);
        let message = SpecialTokens::read(folder.path()).err().unwrap().to_string();
        assert!(message.contains("tokenizer_config.json") && message.contains("`content`"), "{message}");
    }
}
