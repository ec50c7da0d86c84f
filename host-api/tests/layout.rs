//! The mirror against the C compiler, in both directions.

mod common;

use std::fmt::Write;
use std::path::Path;
use std::process::Command;

use common::{compile, scratch};
use host_api::abi::{self, ConstantValue, StructLayout};

const C: &[&str] = &["-std=c11", "-Wall", "-Wextra", "-Werror"];

/// A program that does not compile, or returns nonzero, unless the header agrees with `structs` and the constants.
fn program(structs: &[StructLayout]) -> String {
    let mut c = String::from("#include \"sampler_hook.h\"\n#include <string.h>\n");
    for StructLayout { name, size, align, fields } in structs {
        writeln!(c, "_Static_assert(sizeof({name}) == {size}, \"size of {name}\");").unwrap();
        writeln!(c, "_Static_assert(_Alignof({name}) == {align}, \"alignment of {name}\");").unwrap();
        for field in *fields {
            let (field, offset, size) = (field.name, field.offset, field.size);
            writeln!(c, "_Static_assert(offsetof({name}, {field}) == {offset}, \"offset of {name}.{field}\");")
                .unwrap();
            writeln!(c, "_Static_assert(sizeof((({name} *)0)->{field}) == {size}, \"size of {name}.{field}\");")
                .unwrap();
        }
    }
    let mut strings = String::new();
    for constant in abi::constants() {
        let name = constant.name;
        match constant.value {
            ConstantValue::Integer(value) => {
                writeln!(c, "_Static_assert({name} == {value}, \"value of {name}\");").unwrap()
            }
            ConstantValue::String(text) => writeln!(strings, "  wrong += strcmp({name}, \"{text}\") != 0;").unwrap(),
        }
    }
    write!(c, "int main(void) {{\n  int wrong = 0;\n{strings}  return wrong;\n}}\n").unwrap();
    c
}

/// Compiles and runs a program; the error is the compiler's or the exit code.
fn check(folder: &Path, source: &str) -> Result<(), String> {
    let (file, binary) = (folder.join("layout.c"), folder.join("layout"));
    std::fs::write(&file, source).unwrap();
    compile("cc", C, &[&file, Path::new("-o"), &binary])?;
    let status = Command::new(&binary).status().unwrap();
    if status.success() { Ok(()) } else { Err(format!("{status}")) }
}

fn structs() -> Vec<StructLayout> {
    abi::structs().copied().collect()
}

#[test]
fn the_mirror_has_the_layout_of_the_header() {
    check(&scratch("layout"), &program(&structs())).unwrap();
}

#[test]
fn a_wrong_offset_or_constant_is_noticed() {
    let folder = scratch("layout_wrong");
    let source = program(&structs());
    for (right, wrong, message) in [
        ("offsetof(sh_step, timestep) == 16", "offsetof(sh_step, timestep) == 20", "offset of sh_step.timestep"),
        ("sizeof(sh_error) == 520", "sizeof(sh_error) == 521", "size of sh_error"),
        ("SH_POISONED == 16", "SH_POISONED == 17", "value of SH_POISONED"),
        ("sampler-hook.lora/1", "sampler-hook.lora/2", "exit status: 1"),
    ] {
        assert!(source.contains(right), "{right}");
        let error = check(&folder, &source.replace(right, wrong)).unwrap_err();
        assert!(error.contains(message), "{message}: {error}");
    }
}

/// The header without comments.
fn bare_header() -> String {
    let mut text = String::new();
    let mut rest = abi::HEADER;
    while let Some(start) = rest.find("/*") {
        text += &rest[..start];
        rest = &rest[start..];
        rest = &rest[rest.find("*/").expect("a comment ends") + 2..];
    }
    text + rest
}

/// The constants that a header defines and are not in the mirror.
fn unknown_constants(header: &str) -> Vec<&str> {
    let defined = header.lines().filter_map(|line| line.strip_prefix("#define SH_"));
    let defined = defined.map(|rest| rest.split_whitespace().next().unwrap());
    defined.filter(|name| !abi::constants().any(|constant| constant.name[3..] == **name)).collect()
}

/// Each struct of a header with its member names in order.
fn structs_of(header: &str) -> Vec<(String, Vec<String>)> {
    let identifier = |text: &str| text.trim_matches(|c: char| !c.is_alphanumeric() && c != '_').to_owned();
    let member = |declaration: &str| match declaration.split_once("(*") {
        Some((_, rest)) => identifier(rest.split(')').next().unwrap()),
        None => identifier(declaration.split('[').next().unwrap().split_whitespace().last().unwrap()),
    };
    let mut found = Vec::new();
    for part in header.split("struct ").skip(1) {
        let name: String = part.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
        let Some(body) = part[name.len()..].trim_start().strip_prefix('{') else { continue };
        let body = &body[..body.find('}').expect("a struct ends")];
        let members = body.split(';').filter(|member| !member.trim().is_empty()).map(member).collect();
        found.push((name, members));
    }
    found
}

#[test]
fn the_mirror_misses_nothing() {
    let header = bare_header();
    assert_eq!(unknown_constants(&header), [""; 0]);
    let found = structs_of(&header);
    for (name, members) in &found {
        let known = abi::structs().find(|known| known.name == name);
        let known = known.unwrap_or_else(|| panic!("{name} is not in the mirror"));
        let fields: Vec<&str> = known.fields.iter().map(|field| field.name).collect();
        assert_eq!(fields, *members, "members of {name}");
    }
    let unknown: Vec<&str> =
        abi::structs().map(|known| known.name).filter(|name| !found.iter().any(|(found, _)| found == name)).collect();
    assert_eq!(unknown, [""; 0], "structs that only the mirror has");
    assert_eq!(abi::constants().count(), header.lines().filter(|line| line.starts_with("#define SH_")).count());
}

#[test]
fn an_addition_to_the_header_is_noticed() {
    let header = bare_header();
    assert_eq!(unknown_constants(&format!("{header}\n#define SH_NEW 1\n")), ["NEW"]);
    let grown = header.replace("double guidance_scale;", "double guidance_scale;\n uint32_t more[2];");
    let run = structs_of(&grown).into_iter().find(|(name, _)| name == "sh_run").unwrap();
    assert_eq!(run.1.iter().map(String::as_str).collect::<Vec<_>>()[4..], ["guidance_scale", "more", "text"]);
}

/// The codes are append-only: a reader of an older version has to find them unchanged.
#[test]
fn statuses_keep_their_codes() {
    let codes: Vec<i32> = host_api::Status::ALL.iter().map(|status| status.code()).collect();
    assert_eq!(codes, (0..17).collect::<Vec<_>>());
    assert_eq!(host_api::Status::from_code(17), host_api::Status::Internal);
    assert_eq!(host_api::Status::from_code(-1), host_api::Status::Internal);
}
