//! Opening plugin libraries.

mod common;

use std::path::Path;
use std::sync::Arc;

use common::{TestHost, compile, model, run, scale_library, scratch, step};
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

/// Compiles C source to a library and opens it.
fn open(name: &str, source: &str) -> host_api::Result<Library> {
    let folder = scratch(name);
    let (file, library) = (folder.join("plugin.c"), folder.join("plugin.so"));
    std::fs::write(&file, format!("#include \"sampler_hook.h\"\n{source}")).unwrap();
    compile("cc", &["-std=c11", "-shared", "-fPIC"], &[&file, Path::new("-o"), &library]).unwrap();
    Library::open(library)
}

const ENTRY: &str = "
    static const sh_descriptor *descriptor(uint32_t i) { (void)i; return 0; }
    static sh_status create(sh_string id, const sh_host *host, sh_string config, const sh_plugin **plugin, sh_error *error) {
      static sh_plugin table = {sizeof(table)};
      (void)id, (void)host, (void)config, (void)error;
      *plugin = &table;
      return SH_OK;
    }
    const sh_entry *sampler_hook_entry(uint32_t major) {
      static const sh_entry entry = {SIZE, SH_ABI_MAJOR, MINOR, 0, descriptor, CREATE};
      return major == SPOKEN ? &entry : 0;
    }
";

#[test]
fn libraries_that_do_not_fit_are_refused_with_a_reason() {
    let error = Library::open("/nowhere/plugin.so").unwrap_err();
    assert_eq!(error.status, Status::NotFound);
    assert!(error.message.contains("/nowhere/plugin.so"), "{error}");
    let text = scratch("door_text").join("plugin.so");
    std::fs::write(&text, "not a library").unwrap();
    assert_eq!(Library::open(&text).unwrap_err().status, Status::InvalidData);
    let error = open("door_symbol", "int nothing;").unwrap_err();
    assert_eq!(error.status, Status::InvalidData);
    assert!(error.message.contains("does not export sampler_hook_entry"), "{error}");
    for (name, define, status, part) in [
        ("door_major", "#define SPOKEN 7", Status::Unsupported, "does not speak version 0"),
        ("door_minor", "#define MINOR 7", Status::Unsupported, "speaks draft 0.7, this host 0.3"),
        ("door_size", "#define SIZE 8", Status::InvalidArgument, "struct_size 8"),
        ("door_create", "#define CREATE 0", Status::InvalidData, "incomplete"),
    ] {
        let defaults = [("SPOKEN", "0"), ("MINOR", "SH_ABI_MINOR"), ("SIZE", "sizeof(entry)"), ("CREATE", "create")];
        let defaults = defaults.map(|(name, value)| format!("#ifndef {name}\n#define {name} {value}\n#endif\n"));
        let error = open(name, &format!("{define}\n{}{ENTRY}", defaults.concat())).unwrap_err();
        assert_eq!(error.status, status, "{error}");
        assert!(error.message.contains(part) && error.message.contains(name), "{error}");
    }
}

#[test]
fn a_table_with_null_functions_is_refused() {
    let source = format!(
        "#define SPOKEN 0\n#define MINOR SH_ABI_MINOR\n#define SIZE sizeof(entry)\n#define CREATE create\n{ENTRY}"
    );
    let library = open("door_table", &source).unwrap();
    assert_eq!(library.door(), Door::C);
    let error = library.create("any", Arc::new(TestHost::default()), "").unwrap_err();
    assert_eq!(error.status, Status::InvalidData);
    assert!(error.message.contains("destroy is NULL"), "{error}");
}

/// Both doors of one library, and a second library of the same kind in one process.
#[test]
fn several_libraries_load_and_the_doors_agree() {
    let copy = scratch("door_copy").join("copy.so");
    std::fs::copy(scale_library(), &copy).unwrap();
    let (first, second) = (Library::open(scale_library()).unwrap(), Library::open(&copy).unwrap());
    assert_eq!((first.door(), second.door()), (Door::Rust, Door::Rust));
    assert_eq!(first.descriptors(), second.descriptors());
    let host = Arc::new(TestHost::default());
    first.create("scale", host.clone(), "").unwrap();
    second.create("scale", host.clone(), "").unwrap();
    assert_eq!(host.messages.lock().unwrap().len(), 2);
    let error = first.create("other", host, "").unwrap_err();
    assert_eq!(error.status, Status::NotFound);
}

/// A C host finds the table that the Rust door leads to.
#[test]
fn the_c_door_of_a_rust_library_is_the_same_table() {
    let folder = scratch("door_same");
    let (file, program) = (folder.join("doors.c"), folder.join("doors"));
    let source = r#"
        #include <dlfcn.h>
        #include "sampler_hook.h"
        int main(int argc, char **argv) {
          void *library = dlopen(argv[argc - 1], RTLD_NOW);
          sh_entry_fn entry = 0;
          *(void **)&entry = library ? dlsym(library, SH_ENTRY_SYMBOL) : 0;
          if (!entry || entry(SH_ABI_MAJOR + 1)) return 1;
          const sh_entry *table = entry(SH_ABI_MAJOR);
          return table && table->plugin_count == 1 && table->descriptor(0)->id.size == 5 && !table->descriptor(1) ? 0 : 2;
        }
    "#;
    std::fs::write(&file, source).unwrap();
    compile("cc", &["-std=c11", "-Wall", "-Werror"], &[&file, Path::new("-o"), &program]).unwrap();
    let status = std::process::Command::new(&program).arg(scale_library()).status().unwrap();
    assert!(status.success(), "{status}");
}
