//! A host in C with the real plugin, whose own U-Net computes the gradient of the shipped model.

use serde_json::json;
use tests::cc::{self, HostArguments};
use tests::dpt::scratch;
use tests::plugin_library;

/// Runs the C host; what it printed, and the final latents.
fn run(name: &str, eta: f64) -> (String, Vec<f32>) {
    let folder = scratch(name);
    let model = host_demo::default_model().unwrap();
    let config = json!({
        "adapter": host_demo::default_adapter().unwrap(), "base_model": model, "gradient": "plugin", "eta": eta,
    });
    let (config_file, output) = (folder.join("config.json"), folder.join("latents.f32"));
    std::fs::write(&config_file, config.to_string()).unwrap();
    let arguments = HostArguments {
        library: plugin_library(),
        config: Some(&config_file),
        output: &output,
        family: "sd1",
        unet_in_channels: 4,
        latents: [2, 4, 16, 16],
        text: [16, 128],
        steps: 3,
        unet_config: Some(&model.join("unet/config.json")),
    };
    let done = arguments.run(&cc::program("host", &folder));
    let printed = String::from_utf8_lossy(&done.stdout).into_owned();
    assert!(done.status.success(), "{printed}{}", String::from_utf8_lossy(&done.stderr));
    let bytes = std::fs::read(&output).unwrap();
    (printed, bytes.chunks_exact(4).map(|bytes| f32::from_le_bytes(bytes.try_into().unwrap())).collect())
}

#[test]
fn a_c_host_corrects_with_the_plugin() {
    let (printed, start) = run("c_dpt_start", 0.);
    assert_eq!(printed.matches("outcome 2").count(), 3, "{printed}");
    let (printed, corrected) = run("c_dpt_corrected", 4.);
    for line in ["plugin: dpt ", "end before prepare: status 2", "needs: flags ", ", tap mid\n", "step 2: timestep 333"]
    {
        assert!(printed.contains(line), "{line} is missing in\n{printed}");
    }
    assert_eq!(printed.matches("outcome 1").count(), 3, "{printed}");
    assert_eq!(printed.matches(": status 0, score ").count(), 6, "{printed}");
    assert_eq!((corrected.len(), start.len()), (2 * 4 * 16 * 16, 2 * 4 * 16 * 16));
    assert!(corrected.iter().all(|value| value.is_finite()));
    // Each item has moved, and by less than it is large.
    for (corrected, start) in corrected.chunks(4 * 16 * 16).zip(start.chunks(4 * 16 * 16)) {
        let moved = tests::dpt::norm(&tests::dpt::difference(corrected, start)) / tests::dpt::norm(start);
        assert!(moved > 1e-4 && moved < 1., "moved by {moved}");
    }
    // Once more, the same bits.
    assert_eq!(tests::dpt::float_bits(&run("c_dpt_again", 4.).1), tests::dpt::float_bits(&corrected));
}
