//! Opening plugin libraries.

mod common;

use std::sync::Arc;

use common::{TestHost, model, run, scale_library, step};
use host_api::host::{Door, Library};
use host_api::{Device, Outcome, Status, ViewMut};

#[test]
fn the_rust_door_leads_to_a_working_plugin() {
    let library = Library::open(scale_library()).unwrap();
    assert_eq!(library.door(), Door::Rust);
    assert_eq!(library.descriptors()[0].id, "scale");
    let host = Arc::new(TestHost::default());
    let mut instance = library.create("scale", host.clone(), "").unwrap();
    assert_eq!(host.messages.lock().unwrap()[0].1, "scale: created");
    instance.prepare(&model(), Device::Cpu).unwrap();
    instance.begin(&run(1, 2)).unwrap();
    let mut latents = [1.0f32, 2.0, 3.0, 4.0];
    let mut view = ViewMut::new(&mut latents, &[1, 4, 1, 1]).unwrap();
    assert_eq!(instance.step_in_place(&step(0, 2), &mut view).unwrap().outcome, Outcome::SkippedStrength);
    instance.params().unwrap().unwrap().set("strength", 0.5).unwrap();
    let report = instance.step_in_place(&step(1, 2), &mut view).unwrap();
    assert_eq!((report.outcome, report.items[0].status), (Outcome::Corrected, Status::Ok));
    instance.end().unwrap();
    assert_eq!(latents, [0.5, 1.0, 1.5, 2.0]);
}
