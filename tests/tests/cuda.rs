//! The tests that compare numbers, as one program that finds its device in `TEST_DEVICE`: what `gpu/check.py` carries to a machine with a GPU.

macro_rules! run_on_the_device {
    ($($file:ident)*) => { $(mod $file;)* };
}

run_on_the_device! {
    parity_unet parity_vae parity_text parity_adapter parity_losses parity_runs parity_lora
    gradient_sources unet_precision unet_lora plugin_correction plugin_lora sampling training
}
