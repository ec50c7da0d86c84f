//! CLIP's byte-level BPE tokenizer, from the files of a diffusers folder.

use std::collections::HashMap;
use std::path::Path;

use tokenizers::models::bpe::BPE;
use tokenizers::normalizers::replace::{Replace, ReplacePattern};
use tokenizers::normalizers::{self, Lowercase, NFC};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{AddedToken, SplitDelimiterBehavior};

use super::clip_vocabulary;
use super::special_tokens::SpecialTokens;
use crate::config::read_json;
use crate::{Error, Result};

/// Words as CLIP cuts them: contractions, runs of letters, single digits, runs of anything else.
const CLIP_WORDS: &str = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+";

/// CLIP's tokenizer: text to the ids that the text encoder takes.
///
/// Gives what transformers' `CLIPTokenizer` gives with `padding="max_length", truncation=True`. Special tokens typed
/// inside a prompt are recognised, as there; with SD 2's padding token this includes every `!`.
pub struct Tokenizer {
    tokenizer: tokenizers::Tokenizer,
    bos: u32,
    eos: u32,
    pad: u32,
    length: usize,
}

/// An encoded prompt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tokens {
    /// Start token, the prompt's tokens, end token, padding: exactly [`Tokenizer::length`] ids.
    pub ids: Vec<u32>,
    /// How many of the prompt's tokens did not fit and were cut off its end.
    pub dropped: usize,
}

impl Tokenizer {
    /// Loads `vocab.json`, `merges.txt`, `tokenizer_config.json` and (if present) `special_tokens_map.json`.
    ///
    /// Prompts get `model_max_length` ids, but never more than `max_positions`, the text encoder's
    /// `max_position_embeddings`: folders without a limit of their own carry 1e30. Fails when a file is missing or
    /// ill-formed, or when the vocabulary lacks a special token.
    pub fn load(folder: &Path, max_positions: usize) -> Result<Self> {
        let special = SpecialTokens::read(folder)?;
        let length = (special.model_max_length as usize).min(max_positions);
        if length < 3 {
            let found = special.model_max_length.min(max_positions as f64);
            return Err(Error::file(
                folder.join("tokenizer_config.json"),
                format!("a prompt needs start token, end token and a token between; the length is {found}"),
            ));
        }

        let vocab: HashMap<String, u32> = read_json(&folder.join("vocab.json"))?;
        let merges = read_merges(&folder.join("merges.txt"), &vocab)?;
        Self::build(folder, special, vocab, merges, length)
    }

    /// CLIP's own, for models that bring no tokenizer: 49 408 tokens, prompts of `length` ids filled up with `pad`.
    pub fn clip(pad: &str, length: usize) -> Result<Self> {
        let merges = clip_vocabulary::merges();
        let vocab = clip_vocabulary::vocabulary(&merges);
        Self::build(Path::new("CLIP's vocabulary"), SpecialTokens::clip(pad), vocab, merges, length)
    }

    /// `folder` says in errors where the rest comes from.
    fn build(
        folder: &Path,
        special: SpecialTokens,
        vocab: HashMap<String, u32>,
        merges: Vec<(String, String)>,
        length: usize,
    ) -> Result<Self> {
        let vocab_path = folder.join("vocab.json");
        let known = |token: &AddedToken| {
            vocab.contains_key(&token.content) || special.added.iter().any(|(_, added)| added.content == token.content)
        };
        let SpecialTokens { bos, eos, unk, pad, .. } = &special;
        for (role, token) in [("bos_token", bos), ("eos_token", eos), ("unk_token", unk), ("pad_token", pad)] {
            if !known(token) {
                let message = format!("the {role} `{}` is not in the vocabulary of {}", token.content, vocab.len());
                return Err(Error::file(&vocab_path, message));
            }
        }

        let invalid = |e: tokenizers::Error| Error::file(folder, e);
        let bpe = BPE::builder()
            .vocab_and_merges(vocab.into_iter().collect::<tokenizers::models::bpe::Vocab>(), merges)
            .end_of_word_suffix("</w>".to_owned())
            .unk_token(unk.content.clone())
            .build()
            .map_err(invalid)?;
        let mut tokenizer = tokenizers::Tokenizer::new(bpe);
        let whitespace = Replace::new(ReplacePattern::Regex(r"\s+".to_owned()), " ").map_err(invalid)?;
        let normalizer = normalizers::Sequence::new(vec![NFC.into(), whitespace.into(), Lowercase.into()]);
        tokenizer.with_normalizer(Some(normalizer)).map_err(invalid)?;
        let pattern = SplitPattern::Regex(CLIP_WORDS.to_owned());
        let words = Split::new(pattern, SplitDelimiterBehavior::Removed, true).map_err(invalid)?;
        let bytes = ByteLevel::new(false, true, true);
        tokenizer.with_pre_tokenizer(Some(Sequence::new(vec![words.into(), bytes.into()])));

        tokenizer.add_special_tokens(special.added.iter().map(|(_, token)| token.clone())).map_err(invalid)?;
        tokenizer.add_special_tokens([bos, eos, unk, pad].map(AddedToken::clone)).map_err(invalid)?;
        for (id, token) in &special.added {
            let found = tokenizer.token_to_id(&token.content);
            if found != Some(*id) {
                let message = format!("added token `{}` says id {id}, its place is {found:?}", token.content);
                return Err(Error::file(folder.join("tokenizer_config.json"), message));
            }
        }
        let id = |token: &AddedToken| {
            let missing = || Error::file(&vocab_path, format!("special token `{}` has no id", token.content));
            tokenizer.token_to_id(&token.content).ok_or_else(missing)
        };
        Ok(Self { bos: id(bos)?, eos: id(eos)?, pad: id(pad)?, length, tokenizer })
    }

    /// The number of ids that every prompt gets.
    pub fn length(&self) -> usize {
        self.length
    }

    /// The number of tokens, special ones included.
    pub fn vocab_size(&self) -> usize {
        self.tokenizer.get_vocab_size(true)
    }

    /// Encodes a prompt. One that is too long is cut at the end, with a warning in the log.
    pub fn encode(&self, prompt: &str) -> Result<Tokens> {
        let encoding = self
            .tokenizer
            .encode_fast(prompt, false)
            .map_err(|e| Error::Input(format!("the prompt {prompt:?} cannot be tokenized: {e}")))?;
        let words = encoding.get_ids();
        let kept = words.len().min(self.length - 2);
        let dropped = words.len() - kept;
        if dropped > 0 {
            log::warn!("the prompt has {} tokens and {kept} fit: the last {dropped} were dropped", words.len());
        }
        let mut ids = Vec::with_capacity(self.length);
        ids.push(self.bos);
        ids.extend_from_slice(&words[..kept]);
        ids.push(self.eos);
        ids.resize(self.length, self.pad);
        Ok(Tokens { ids, dropped })
    }
}

/// Reads `merges.txt`: after a version line, one pair of tokens a line, most frequent first. Both tokens and the one they
/// make must be in the vocabulary.
fn read_merges(path: &Path, vocab: &HashMap<String, u32>) -> Result<Vec<(String, String)>> {
    let text = std::fs::read_to_string(path).map_err(|e| Error::io(path, e))?;
    let mut merges = Vec::new();
    for (number, line) in text.lines().enumerate().filter(|(_, line)| !line.is_empty() && !line.starts_with("#version"))
    {
        let fail = |message: String| Error::file(path, format!("line {}: {message}", number + 1));
        let Some((left, right)) = line.split_once(' ').filter(|(_, right)| !right.contains(' ')) else {
            return Err(fail(format!("expected two tokens, found {line:?}")));
        };
        for token in [left, right, &format!("{left}{right}")] {
            if !vocab.contains_key(token) {
                return Err(fail(format!("token {token:?} is not in vocab.json")));
            }
        }
        merges.push((left.to_owned(), right.to_owned()));
    }
    Ok(merges)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Folder;

    /// Six letters, with and without the end-of-word mark, and the merges to `ab</w>`; ids in this order.
    const VOCAB: &str = r#"{"a": 0, "b": 1, "!": 2, "a</w>": 3, "b</w>": 4, "!</w>": 5, "ab</w>": 6,
        "<|startoftext|>": 7, "<|endoftext|>": 8}"#;
    const MERGES: &str = "#version: 0.2\na b</w>\n";

    fn folder(config: &str) -> Folder {
        let folder = Folder::new();
        folder.write("vocab.json", VOCAB);
        folder.write("merges.txt", MERGES);
        folder.write("tokenizer_config.json", config);
        folder
    }

    fn load(folder: &Folder) -> Result<Tokenizer> {
        Tokenizer::load(folder.path(), 6)
    }

    fn ids(config: &str, prompt: &str) -> Vec<u32> {
        load(&folder(config)).unwrap().encode(prompt).unwrap().ids
    }

    fn failure(folder: &Folder) -> String {
        load(folder).err().unwrap().to_string()
    }

    #[test]
    fn words_are_merged_lowercased_and_padded() {
        assert_eq!(ids("{}", "  AB\t b "), [7, 6, 4, 8, 8, 8]);
        assert_eq!(ids("{}", "ba ab!"), [7, 1, 3, 6, 5, 8]);
        assert_eq!(ids("{}", ""), [7, 8, 8, 8, 8, 8]);
    }

    #[test]
    fn special_tokens_in_the_prompt_are_recognised() {
        assert_eq!(ids("{}", "a<|startoftext|>b"), [7, 3, 7, 4, 8, 8]);
        // SD 2 pads with `!`, which makes every `!` of a prompt that token.
        assert_eq!(ids(r#"{"pad_token": "!"}"#, "ab!"), [7, 6, 2, 8, 2, 2]);
        // A normalised special token is found after lowercasing, one as typed is not.
        let as_typed = r#"{"unk_token": "a", "pad_token": "!"}"#;
        assert_eq!(ids(as_typed, "b<|ENDOFTEXT|>"), [7, 4, 0, 0, 0, 8]);
        let normalized = as_typed.replace('{', r#"{"eos_token": {"content": "<|endoftext|>", "normalized": true}, "#);
        assert_eq!(ids(&normalized, "b<|ENDOFTEXT|>"), [7, 4, 8, 8, 2, 2]);
    }

    #[test]
    fn a_long_prompt_is_cut_and_says_so() {
        let tokenizer = load(&folder("{}")).unwrap();
        let tokens = tokenizer.encode("ab a b ab a b b").unwrap();
        assert_eq!(tokens, Tokens { ids: vec![7, 6, 3, 4, 6, 8], dropped: 3 });
        assert_eq!(tokenizer.encode("ab a b ab").unwrap().dropped, 0);
    }

    #[test]
    fn the_length_is_the_files_or_the_models() {
        for (config, length) in [
            (r#"{"model_max_length": 4}"#, 4),
            (r#"{"model_max_length": 1000000000000000019884624838656}"#, 6),
            (r#"{"model_max_length": 77}"#, 6),
            ("{}", 6),
        ] {
            let tokenizer = load(&folder(config)).unwrap();
            assert_eq!(tokenizer.length(), length);
            assert_eq!(tokenizer.encode("a").unwrap().ids.len(), length);
        }
        for unfit in ["2", "-5"] {
            let message = failure(&folder(&format!(r#"{{"model_max_length": {unfit}}}"#)));
            assert!(message.contains("tokenizer_config.json") && message.contains(unfit), "{message}");
        }
    }

    #[test]
    fn added_tokens_extend_the_vocabulary() {
        let config = r#"{"added_tokens_decoder": {"9": {"content": "<cat>"}, "8": {"content": "<|endoftext|>"}}}"#;
        assert_eq!(ids(config, "a <cat> b"), [7, 3, 9, 4, 8, 8]);
        let message = failure(&folder(&config.replace("\"9\"", "\"12\"")));
        assert!(message.contains("`<cat>` says id 12") && message.contains("tokenizer_config.json"), "{message}");
    }

    #[test]
    fn missing_files_are_named() {
        for name in ["vocab.json", "merges.txt", "tokenizer_config.json"] {
            let folder = folder("{}");
            std::fs::remove_file(folder.path().join(name)).unwrap();
            let message = failure(&folder);
            assert!(message.contains(name), "{message}");
        }
    }

    #[test]
    fn ill_formed_files_are_named() {
        for (name, contents, named) in [
            ("vocab.json", r#"{"a": 0, "#, "EOF"),
            ("vocab.json", r#"{"a": -1}"#, "-1"),
            ("tokenizer_config.json", "{", "EOF"),
            ("special_tokens_map.json", r#"{"pad_token": []}"#, "`content`"),
            ("merges.txt", "#version: 0.2\na b</w>\na\n", "line 3: expected two tokens, found \"a\""),
            ("merges.txt", "a b c\n", "line 1: expected two tokens"),
            ("merges.txt", "a x\n", "line 1: token \"x\""),
            ("merges.txt", "<|startoftext|> <|startoftext|>\n", "<|startoftext|><|startoftext|>"),
        ] {
            let folder = folder("{}");
            folder.write(name, contents);
            let message = failure(&folder);
            assert!(message.contains(name) && message.contains(named), "{message}");
        }
    }

    #[test]
    fn a_special_token_must_be_in_the_vocabulary() {
        for role in ["bos_token", "eos_token", "unk_token", "pad_token"] {
            let message = failure(&folder(&format!(r#"{{"{role}": "<|none|>"}}"#)));
            assert!(message.contains("vocab.json") && message.contains(&format!("{role} `<|none|>`")), "{message}");
        }
    }
}
