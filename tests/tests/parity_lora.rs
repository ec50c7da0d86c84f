//! Merged LoRA weights against PyTorch's: rank 3, alpha 6, on four projections of either kind of attention.

use candle_core::{DType, Device};
use diffusion::{LoraEntry, UNet};
use tests::{FAMILIES, assert_close, case, parity, relative_error};

#[test]
fn parity_of_merged_weights() {
    for family in FAMILIES {
        let peft = case(&format!("{family}-cases/lora_peft.safetensors"));
        let merged = case(&format!("{family}-cases/lora_merged.safetensors"));
        let entry = |name: &String| {
            let module = name.strip_suffix(".weight").unwrap().to_owned();
            let factor = |part: &str| peft[&format!("unet.{module}.{part}")].clone();
            let (down, up) = (factor("lora_A.weight"), factor("lora_B.weight"));
            let alpha: f32 = factor("alpha").to_scalar().unwrap();
            LoraEntry { module, scale: alpha as f64 / down.dim(0).unwrap() as f64, down, up }
        };
        let entries: Vec<_> = merged.keys().map(entry).collect();
        assert_eq!(3 * entries.len(), peft.len());

        let folder = parity(&format!("{family}-tiny/unet"));
        let mut unet = UNet::load(&folder, DType::F32, &Device::Cpu).unwrap();
        let plain: Vec<_> = unet.projections().map(|(module, weight)| (module, weight.clone())).collect();
        unet.merge_lora(&entries, 1.).unwrap();
        let mut changed = 0;
        for ((module, weight), (_, before)) in unet.projections().zip(plain) {
            match merged.get(&format!("{module}.weight")) {
                Some(expected) => {
                    assert!(relative_error(&before, expected) > 1e-2, "{family} {module}: the change is too small");
                    assert_close(&format!("{family} {module}"), weight, expected, 1e-6);
                    changed += 1;
                }
                None => assert_eq!(relative_error(weight, &before), 0., "{family} {module}"),
            }
        }
        assert_eq!(changed, entries.len());
    }
}
