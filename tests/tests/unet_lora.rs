//! Merging low-rank changes into the U-Net's attention projections and taking them out again.

use candle_core::{DType, Tensor};
use diffusion::{LoraEntry, TextKeys, UNet};
use tests::{assert_close, bits, committed, device, relative_error, tiny_unet, values};

const EARLY: &str = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q";
const MID: &str = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k";
const LATE: &str = "up_blocks.3.attentions.0.transformer_blocks.0.attn1.to_out.0";

fn weight(unet: &UNet, module: &str) -> Tensor {
    unet.projections().find(|(path, _)| path == module).unwrap().1.clone()
}

fn entry(unet: &UNet, module: &str, seed: u32) -> LoraEntry {
    let (outputs, inputs) = weight(unet, module).dims2().unwrap();
    LoraEntry { module: module.into(), down: values(seed, (3, inputs)), up: values(seed + 1, (outputs, 3)), scale: 0.5 }
}

/// `scale * up @ down`.
fn change(entry: &LoraEntry) -> Tensor {
    (entry.up.matmul(&entry.down).unwrap() * entry.scale).unwrap()
}

fn all_bits(unet: &UNet) -> Vec<(String, Vec<u32>)> {
    unet.projections().map(|(module, weight)| (module, bits(weight))).collect()
}

fn text(unet: &UNet) -> TextKeys {
    unet.text(&values(90, (1, 5, 32))).unwrap()
}

fn noise(unet: &UNet) -> Vec<u32> {
    bits(&unet.forward(&values(91, (1, 4, 8, 8)), &[500.], &text(unet)).unwrap())
}

#[test]
fn restore_leaves_the_very_same_bits() {
    for (family, dtype) in [("sd1", DType::F32), ("sd2", DType::F32), ("sd2", DType::F16)] {
        let mut unet = tiny_unet(family, dtype);
        let (weights, output) = (all_bits(&unet), noise(&unet));
        // Merged twice, so that a restore to the state before the last merge alone would show.
        for seed in [1, 11] {
            let entries = [entry(&unet, EARLY, seed), entry(&unet, MID, seed + 2), entry(&unet, LATE, seed + 4)];
            unet.merge_lora(&entries, 1.).unwrap();
        }
        let changed: Vec<_> = all_bits(&unet).into_iter().zip(&weights).filter(|(a, b)| a != *b).collect();
        assert_eq!(changed.len(), 3, "{family} {dtype:?}");
        assert_ne!(noise(&unet), output);
        unet.restore_lora();
        assert!(all_bits(&unet) == weights, "{family} {dtype:?}");
        assert!(noise(&unet) == output, "{family} {dtype:?}");
    }
}

#[test]
fn entries_for_one_module_add_up() {
    let mut unet = tiny_unet("sd1", DType::F32);
    let (a, b) = (entry(&unet, MID, 1), entry(&unet, MID, 3));
    let both = ((change(&a) + change(&b)).unwrap() * 0.7).unwrap();
    let expected = (weight(&unet, MID) + both).unwrap();
    unet.merge_lora(&[a.clone(), b.clone()], 0.7).unwrap();
    assert_close("in one call", &weight(&unet, MID), &expected, 1e-6);
    unet.restore_lora();
    unet.merge_lora(&[a], 0.7).unwrap();
    assert!(relative_error(&weight(&unet, MID), &expected) > 1e-2);
    unet.merge_lora(&[b], 0.7).unwrap();
    assert_close("in two calls", &weight(&unet, MID), &expected, 1e-6);
}

/// Rounding after each entry would leave f16 weights off by the digits that the first change, far larger than they, cost.
#[test]
fn entries_are_summed_before_they_are_rounded() {
    let mut unet = tiny_unet("sd2", DType::F16);
    let before = weight(&unet, MID);
    let there = LoraEntry { scale: 64., ..entry(&unet, MID, 1) };
    let back = LoraEntry { scale: -64., ..there.clone() };
    unet.merge_lora(&[there, back], 1.).unwrap();
    assert_close("there and back", &weight(&unet, MID), &before, 1e-4);
}

#[test]
fn what_does_not_fit_is_named_and_changes_nothing() {
    let mut unet = tiny_unet("sd1", DType::F32);
    let weights = all_bits(&unet);
    let keys = text(&unet);
    let good = entry(&unet, EARLY, 1);
    let wrong = |change: &dyn Fn(&mut LoraEntry)| {
        let mut entry = good.clone();
        change(&mut entry);
        entry
    };
    let fit = format!("LoRA `{EARLY}`");
    let absent = |module: &str| (format!("no attention projection `{module}`"), module.to_owned());
    let unknown = [
        "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_x",
        "down_blocks.0.attentions.0.transformer_blocks.0.attn1",
        "down_blocks.0.attentions.0.transformer_blocks.0.attn1to_q",
        "down_blocks.0.resnets.0.conv1",
        "down_blocks.9.attentions.0.transformer_blocks.0.attn1.to_q",
        "",
    ];
    let mut cases: Vec<(String, LoraEntry)> = vec![
        (format!("{fit}: down [3, 15]"), wrong(&|e| e.down = values(2, (3, 15)))),
        (format!("{fit}: down [3, 16] and up [17, 3]"), wrong(&|e| e.up = values(2, (17, 3)))),
        (format!("{fit}: down [2, 16] and up [16, 3]"), wrong(&|e| e.down = values(2, (2, 16)))),
        (format!("{fit}: down [16]"), wrong(&|e| e.down = values(2, 16))),
        (format!("{fit}: down [3, 16, 1, 1]"), wrong(&|e| e.down = values(2, (3, 16, 1, 1)))),
    ];
    cases.extend(unknown.map(absent).map(|(message, module)| (message, wrong(&|e| e.module = module.clone()))));
    for (expected, wrong) in cases {
        // After good ones, for the same projection and for another.
        let entries = [good.clone(), entry(&unet, MID, 5), wrong];
        let message = unet.merge_lora(&entries, 1.).unwrap_err().to_string();
        assert!(message.contains(&expected), "{message}, not {expected}");
        assert!(all_bits(&unet) == weights, "{message}: weights changed");
        // Nothing changed, so text keys stay valid.
        unet.forward(&values(91, (1, 4, 8, 8)), &[500.], &keys).unwrap();
    }
}

#[test]
fn a_partially_loaded_unet_skips_entries_beyond_its_tap() {
    let whole = tiny_unet("sd1", DType::F32);
    let mut partial = UNet::load_to(&committed("sd1-tiny/unet"), "mid", DType::F32, device()).unwrap();
    assert!(partial.projections().count() < whole.projections().count());
    let weights = all_bits(&partial);
    partial.merge_lora(&[entry(&whole, LATE, 1)], 1.).unwrap();
    assert!(all_bits(&partial) == weights);
    partial.merge_lora(&[entry(&whole, EARLY, 1), entry(&whole, LATE, 3), entry(&whole, MID, 5)], 1.).unwrap();
    assert_eq!(all_bits(&partial).into_iter().zip(&weights).filter(|(a, b)| a != *b).count(), 2);
    let unknown = LoraEntry { module: EARLY.replace("to_q", "to_x"), ..entry(&whole, EARLY, 1) };
    assert!(partial.merge_lora(&[unknown], 1.).unwrap_err().to_string().contains("to_x"));
}

#[test]
fn text_keys_and_tapes_of_other_weights_are_refused() {
    let mut unet = tiny_unet("sd1", DType::F32);
    let (latents, lora) = (values(91, (1, 4, 8, 8)), [entry(&unet, MID, 1)]);
    let refuses = |unet: &UNet, keys: &TextKeys| {
        let message = unet.forward(&latents, &[500.], keys).unwrap_err().to_string();
        assert!(message.contains("text keys were computed with other weights"), "{message}");
    };
    let plain = text(&unet);
    let tap = unet.config().tap("mid").unwrap();
    let (activation, tape) = unet.forward_to(&latents, &[500.], &plain, tap).unwrap();

    unet.merge_lora(&lora, 1.).unwrap();
    refuses(&unet, &plain);
    refuses(&unet, &plain.rows(0, 1).unwrap());
    let message = unet.vjp(tape, &activation).unwrap_err().to_string();
    assert!(message.contains("recorded with other weights"), "{message}");

    let merged = text(&unet);
    unet.forward(&latents, &[500.], &merged).unwrap();
    unet.restore_lora();
    refuses(&unet, &merged);

    // Of another U-Net: fewer cross-attentions, or the same number with other weights.
    let partial = UNet::load_to(&committed("sd1-tiny/unet"), "down0", DType::F32, device()).unwrap();
    refuses(&unet, &text(&partial));
    refuses(&unet, &text(&tiny_unet("sd2", DType::F32)));
}
