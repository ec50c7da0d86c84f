//! The names of low-rank factors in files, and the modules that they mean.

use std::fmt;

/// How a file names its factors.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum LoraLayout {
    /// diffusers' attention processors, as DPT's release has them: `unet.<attention>.processor.to_q_lora.down.weight`. Has no
    /// alpha.
    Release,
    /// PEFT, as current diffusers: `unet.<module>.lora_A.weight`, `lora_B.weight`, `alpha`.
    Peft,
    /// kohya: `lora_unet_<module with _ for .>.lora_down.weight`, `lora_up.weight`, `alpha`.
    Kohya,
}

impl LoraLayout {
    /// What users call it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Release => "release",
            Self::Peft => "peft",
            Self::Kohya => "kohya",
        }
    }
}

impl fmt::Display for LoraLayout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What a tensor of a LoRA file is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum LoraPart {
    /// `[rank, in]`.
    Down,
    /// `[out, rank]`.
    Up,
    /// A number; the product is scaled by alpha / rank.
    Alpha,
}

/// The model that a factor changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Network {
    /// The U-Net.
    UNet,
    /// The text encoder; of models with several, the number of the encoder.
    TextEncoder(u8),
}

/// A module that factors change, by its dotted path in diffusers' or transformers' model.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LoraModule {
    /// The model.
    pub network: Network,
    /// Such as `mid_block.attentions.0.transformer_blocks.0.attn2.to_k`.
    pub path: String,
}

/// A tensor's name, understood.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LoraKey {
    /// Whose name it is.
    pub layout: LoraLayout,
    /// What is changed.
    pub module: LoraModule,
    /// Which of the module's tensors it is.
    pub part: LoraPart,
}

/// Endings of PEFT's and of older diffusers' names.
const PEFT_PARTS: [(&str, LoraPart); 5] = [
    (".lora_A.weight", LoraPart::Down),
    (".lora_B.weight", LoraPart::Up),
    (".lora.down.weight", LoraPart::Down),
    (".lora.up.weight", LoraPart::Up),
    (".alpha", LoraPart::Alpha),
];

const KOHYA_PARTS: [(&str, LoraPart); 3] =
    [(".lora_down.weight", LoraPart::Down), (".lora_up.weight", LoraPart::Up), (".alpha", LoraPart::Alpha)];

/// Marks of adapters that are not two factors, and what they are called.
const OTHER_KINDS: [(&str, &str); 8] = [
    ("hada_", "LoHa"),
    ("lokr_", "LoKr"),
    ("dora_scale", "DoRA"),
    ("lora_magnitude_vector", "DoRA"),
    ("oft_", "OFT"),
    ("lora_mid", "LoCon with a third factor"),
    (".diff", "a full difference"),
    ("glora", "GLoRA"),
];

/// Names of modules that hold an underscore themselves: kohya writes one for every dot too.
const COMPOUND: [&str; 24] = [
    "down_blocks",
    "up_blocks",
    "mid_block",
    "transformer_blocks",
    "proj_in",
    "proj_out",
    "time_emb_proj",
    "time_embedding",
    "conv_shortcut",
    "conv_in",
    "conv_out",
    "linear_1",
    "linear_2",
    "to_q",
    "to_k",
    "to_v",
    "to_out",
    "text_model",
    "self_attn",
    "q_proj",
    "k_proj",
    "v_proj",
    "out_proj",
    "text_projection",
];

impl LoraKey {
    /// Understands a tensor's name; `None` when it is not that of a low-rank factor. Fails, with what it is instead, on names of
    /// adapters that are not two factors.
    pub fn parse(name: &str) -> Result<Option<Self>, String> {
        if let Some((_, kind)) = OTHER_KINDS.iter().find(|(mark, _)| name.contains(mark)) {
            return Err(format!("`{name}` belongs to {kind}, which is not supported"));
        }
        if let Some((layout, module, part)) = kohya(name).or_else(|| release(name)).or_else(|| peft(name)) {
            return Ok(Some(Self { layout, module, part }));
        }
        Ok(None)
    }
}

fn strip_part(name: &str, parts: &[(&str, LoraPart)]) -> Option<(String, LoraPart)> {
    parts.iter().find_map(|(ending, part)| Some((name.strip_suffix(ending)?.to_owned(), *part)))
}

fn kohya(name: &str) -> Option<(LoraLayout, LoraModule, LoraPart)> {
    let (stem, part) = strip_part(name, &KOHYA_PARTS)?;
    let (prefix, path) = ["lora_unet_", "lora_te_", "lora_te1_", "lora_te2_"]
        .iter()
        .find_map(|prefix| Some((*prefix, stem.strip_prefix(prefix)?)))?;
    let network = match prefix {
        "lora_unet_" => Network::UNet,
        "lora_te2_" => Network::TextEncoder(2),
        _ => Network::TextEncoder(1),
    };
    Some((LoraLayout::Kohya, LoraModule { network, path: dotted(path) }, part))
}

/// `down_blocks_0_attentions_0` to `down_blocks.0.attentions.0`.
fn dotted(path: &str) -> String {
    let (mut rest, mut words) = (path, Vec::new());
    while !rest.is_empty() {
        let whole =
            |word: &&&str| rest.strip_prefix(**word).is_some_and(|tail| tail.is_empty() || tail.starts_with('_'));
        let length = match COMPOUND.iter().filter(whole).map(|word| word.len()).max() {
            Some(length) => length,
            None => rest.find('_').unwrap_or(rest.len()),
        };
        words.push(&rest[..length]);
        rest = rest[length..].strip_prefix('_').unwrap_or(&rest[length..]);
    }
    words.join(".")
}

fn release(name: &str) -> Option<(LoraLayout, LoraModule, LoraPart)> {
    let (stem, part) = strip_part(name, &[("_lora.down.weight", LoraPart::Down), ("_lora.up.weight", LoraPart::Up)])?;
    let (attention, projection) = stem.strip_prefix("unet.").unwrap_or(&stem).split_once(".processor.")?;
    let projection = if projection == "to_out" { "to_out.0" } else { projection };
    let path = format!("{attention}.{projection}");
    Some((LoraLayout::Release, LoraModule { network: Network::UNet, path }, part))
}

fn peft(name: &str) -> Option<(LoraLayout, LoraModule, LoraPart)> {
    let (stem, part) = strip_part(name, &PEFT_PARTS)?;
    let stem = stem.strip_prefix("base_model.model.").unwrap_or(&stem);
    let networks = [
        ("unet.", Network::UNet),
        ("text_encoder.", Network::TextEncoder(1)),
        ("text_encoder_2.", Network::TextEncoder(2)),
    ];
    let known = networks.iter().find_map(|(prefix, network)| Some((stem.strip_prefix(prefix)?, *network)));
    let (path, network) = known.unwrap_or((stem, Network::UNet));
    // Some files leave out the place of the projection among the two modules of `to_out`.
    let path = if path.ends_with(".to_out") { format!("{path}.0") } else { path.to_owned() };
    Some((LoraLayout::Peft, LoraModule { network, path }, part))
}

impl LoraModule {
    /// The name of one of its tensors in a layout; `None` where the layout has none for it.
    pub fn name(&self, layout: LoraLayout, part: LoraPart) -> Option<String> {
        let Self { network, path } = self;
        match layout {
            LoraLayout::Release => {
                let (attention, projection) = self.attention_projection()?;
                let part = match part {
                    LoraPart::Down => "down",
                    LoraPart::Up => "up",
                    LoraPart::Alpha => return None,
                };
                let projection = projection.trim_end_matches(".0");
                Some(format!("unet.{attention}.processor.{projection}_lora.{part}.weight"))
            }
            LoraLayout::Peft => {
                let prefix = match network {
                    Network::UNet => "unet",
                    Network::TextEncoder(2) => "text_encoder_2",
                    Network::TextEncoder(_) => "text_encoder",
                };
                let (ending, _) = PEFT_PARTS.iter().find(|(_, other)| *other == part)?;
                Some(format!("{prefix}.{path}{ending}"))
            }
            LoraLayout::Kohya => {
                let prefix = match network {
                    Network::UNet => "lora_unet",
                    Network::TextEncoder(2) => "lora_te2",
                    Network::TextEncoder(_) => "lora_te",
                };
                let underscored = path.replace('.', "_");
                // A module that cannot be told from its underscored name would come back as another.
                (dotted(&underscored) == *path).then_some(())?;
                let (ending, _) = KOHYA_PARTS.iter().find(|(_, other)| *other == part)?;
                Some(format!("{prefix}_{underscored}{ending}"))
            }
        }
    }

    /// The attention and its projection, where that is what the module is.
    fn attention_projection(&self) -> Option<(&str, &str)> {
        let path = &self.path;
        let projections = [".to_q", ".to_k", ".to_v", ".to_out.0"];
        let projection = projections.into_iter().find(|projection| path.ends_with(projection))?;
        let attention = path.strip_suffix(projection)?;
        let of_unet = self.network == Network::UNet && (attention.ends_with(".attn1") || attention.ends_with(".attn2"));
        of_unet.then_some((attention, &projection[1..]))
    }

    /// Why a change of this module is not applied here; `None` for attention projections of the U-Net, which are. Fails when
    /// a U-Net has no such module.
    pub fn not_applied(&self) -> Result<Option<&'static str>, String> {
        let path = self.path.as_str();
        if self.attention_projection().is_some() {
            return Ok(None);
        }
        if self.network != Network::UNet {
            return Ok(Some("text encoder"));
        }
        let has = |word: &str| path.split('.').any(|part| part == word);
        let reasons: [(&[&str], &str); 6] = [
            (&["ff"], "feed-forward"),
            (&["proj_in", "proj_out"], "projection around attention"),
            (&["time_emb_proj", "time_embedding"], "timestep embedding"),
            (&["conv", "conv1", "conv2", "conv_shortcut", "conv_in", "conv_out"], "convolution"),
            (&["norm", "norm1", "norm2", "norm3", "conv_norm_out"], "norm"),
            (&["add_embedding"], "added embedding"),
        ];
        let reason = reasons.iter().find(|(words, _)| words.iter().any(|word| has(word)));
        reason.map(|(_, reason)| Some(*reason)).ok_or_else(|| format!("`{path}` is no module of a U-Net"))
    }
}

impl fmt::Display for LoraModule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.network {
            Network::UNet => f.write_str(&self.path),
            Network::TextEncoder(2) => write!(f, "text_encoder_2.{}", self.path),
            Network::TextEncoder(_) => write!(f, "text_encoder.{}", self.path),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ATTENTION: &str = "down_blocks.0.attentions.1.transformer_blocks.0.attn2";

    fn key(name: &str) -> LoraKey {
        LoraKey::parse(name).unwrap().unwrap_or_else(|| panic!("{name}"))
    }

    #[test]
    fn every_layout_names_the_same_module() {
        let path = format!("{ATTENTION}.to_out.0");
        let underscored = path.replace('.', "_");
        for (name, layout, part) in [
            (format!("unet.{ATTENTION}.processor.to_out_lora.down.weight"), LoraLayout::Release, LoraPart::Down),
            (format!("{ATTENTION}.processor.to_out_lora.up.weight"), LoraLayout::Release, LoraPart::Up),
            (format!("unet.{path}.lora_A.weight"), LoraLayout::Peft, LoraPart::Down),
            (format!("{path}.lora_B.weight"), LoraLayout::Peft, LoraPart::Up),
            (format!("base_model.model.{path}.lora_B.weight"), LoraLayout::Peft, LoraPart::Up),
            (format!("unet.{ATTENTION}.to_out.lora.down.weight"), LoraLayout::Peft, LoraPart::Down),
            (format!("unet.{path}.alpha"), LoraLayout::Peft, LoraPart::Alpha),
            (format!("lora_unet_{underscored}.lora_down.weight"), LoraLayout::Kohya, LoraPart::Down),
            (format!("lora_unet_{underscored}.alpha"), LoraLayout::Kohya, LoraPart::Alpha),
        ] {
            let module = LoraModule { network: Network::UNet, path: path.clone() };
            assert_eq!(key(&name), LoraKey { layout, module, part }, "{name}");
        }
    }

    #[test]
    fn underscored_paths_are_read_by_their_grammar() {
        for path in [
            "mid_block.attentions.0.transformer_blocks.0.attn1.to_q",
            "up_blocks.3.attentions.2.transformer_blocks.0.ff.net.0.proj",
            "up_blocks.1.attentions.0.proj_in",
            "down_blocks.2.resnets.1.time_emb_proj",
            "down_blocks.2.resnets.1.conv_shortcut",
            "down_blocks.0.downsamplers.0.conv",
            "time_embedding.linear_2",
            "conv_in",
            "text_model.encoder.layers.11.self_attn.q_proj",
            "text_model.encoder.layers.0.mlp.fc1",
        ] {
            assert_eq!(dotted(&path.replace('.', "_")), path);
        }
    }

    #[test]
    fn names_come_back_in_every_layout() {
        for (path, network) in [
            (format!("{ATTENTION}.to_k"), Network::UNet),
            (format!("{ATTENTION}.to_out.0"), Network::UNet),
            ("up_blocks.0.resnets.0.conv1".into(), Network::UNet),
            ("text_model.encoder.layers.0.mlp.fc1".into(), Network::TextEncoder(1)),
        ] {
            let module = LoraModule { network, path };
            for layout in [LoraLayout::Release, LoraLayout::Peft, LoraLayout::Kohya] {
                for part in [LoraPart::Down, LoraPart::Up, LoraPart::Alpha] {
                    let attention = module.not_applied().unwrap().is_none();
                    match module.name(layout, part) {
                        Some(name) => assert_eq!(key(&name), LoraKey { layout, module: module.clone(), part }),
                        None => assert!(layout == LoraLayout::Release && (part == LoraPart::Alpha || !attention)),
                    }
                }
            }
        }
        // An underscore that no word accounts for could mean a dot.
        let odd = LoraModule { network: Network::UNet, path: "my_block.to_q".into() };
        assert_eq!(odd.name(LoraLayout::Kohya, LoraPart::Up), None);
    }

    #[test]
    fn what_is_not_applied_has_a_reason() {
        let reason = |name: &str| key(name).module.not_applied();
        for (name, expected) in [
            ("unet.up_blocks.0.attentions.0.transformer_blocks.0.ff.net.2.lora_A.weight", "feed-forward"),
            ("lora_unet_down_blocks_0_resnets_0_conv1.lora_down.weight", "convolution"),
            ("lora_unet_mid_block_attentions_0_proj_in.alpha", "projection around attention"),
            ("lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_up.weight", "text encoder"),
            ("text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight", "text encoder"),
            ("unet.down_blocks.0.resnets.0.time_emb_proj.lora_A.weight", "timestep embedding"),
        ] {
            assert_eq!(reason(name), Ok(Some(expected)), "{name}");
        }
        assert!(reason("unet.blocks.0.fused.lora_A.weight").unwrap_err().contains("`blocks.0.fused`"));
    }

    #[test]
    fn other_adapters_are_told_by_name() {
        for (name, kind) in [
            ("lora_unet_mid_block_attentions_0_proj_in.hada_w1_a", "LoHa"),
            ("lora_unet_mid_block_attentions_0_proj_in.lokr_w1", "LoKr"),
            ("unet.a.to_q.lora_magnitude_vector", "DoRA"),
        ] {
            assert!(LoraKey::parse(name).unwrap_err().contains(kind), "{name}");
        }
        assert_eq!(LoraKey::parse("query_embed.weight"), Ok(None));
    }
}
