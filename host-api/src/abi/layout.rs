//! What the mirror knows of itself: each struct's and constant's layout, for the check against the C compiler.

/// A struct of the header as Rust lays it out.
#[derive(Clone, Copy, Debug)]
pub struct StructLayout {
    /// The C name.
    pub name: &'static str,
    /// `sizeof`.
    pub size: usize,
    /// `_Alignof`.
    pub align: usize,
    /// The members in order.
    pub fields: &'static [FieldLayout],
}

/// A member of a struct.
#[derive(Clone, Copy, Debug)]
pub struct FieldLayout {
    /// The C name.
    pub name: &'static str,
    /// `offsetof`.
    pub offset: usize,
    /// `sizeof` of the member.
    pub size: usize,
}

/// A constant of the header.
#[derive(Clone, Copy, Debug)]
pub struct Constant {
    /// The C name.
    pub name: &'static str,
    /// What the mirror says it is.
    pub value: ConstantValue,
}

/// The value of a [`Constant`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ConstantValue {
    /// An integer of any C type.
    Integer(i64),
    /// A string literal.
    String(&'static str),
}

/// FNV-1a over names, offsets and sizes: two mirrors with the same tables have the same fingerprint.
pub const fn fingerprint(structs: &[StructLayout], names: &[&str]) -> u64 {
    let mut hash = 0xcbf2_9ce4_8422_2325;
    let mut i = 0;
    while i < structs.len() {
        let mut wanted = false;
        let mut j = 0;
        while j < names.len() {
            wanted |= equal(structs[i].name.as_bytes(), names[j].as_bytes());
            j += 1;
        }
        if wanted {
            hash = absorb(hash, structs[i].name.as_bytes());
            hash = absorb(hash, &(structs[i].size as u64).to_le_bytes());
            let mut k = 0;
            while k < structs[i].fields.len() {
                let field = structs[i].fields[k];
                hash = absorb(hash, field.name.as_bytes());
                hash = absorb(hash, &(field.offset as u64).to_le_bytes());
                hash = absorb(hash, &(field.size as u64).to_le_bytes());
                k += 1;
            }
        }
        i += 1;
    }
    hash
}

const fn absorb(mut hash: u64, bytes: &[u8]) -> u64 {
    let mut i = 0;
    while i < bytes.len() {
        hash = (hash ^ bytes[i] as u64).wrapping_mul(0x0000_0100_0000_01b3);
        i += 1;
    }
    hash
}

/// `a == b`, at compile time.
pub(crate) const fn equal(a: &[u8], b: &[u8]) -> bool {
    if a.len() != b.len() {
        return false;
    }
    let mut i = 0;
    while i < a.len() {
        if a[i] != b[i] {
            return false;
        }
        i += 1;
    }
    true
}

/// Defines `#[repr(C)]` structs and, in the same breath, the module's `STRUCTS`.
macro_rules! c_structs {
    ($($(#[$meta:meta])* pub struct $name:ident { $($(#[$field_meta:meta])* pub $field:ident: $ty:ty,)* })*) => {
        $(
            $(#[$meta])*
            #[repr(C)]
            #[derive(Clone, Copy, Debug)]
            pub struct $name {
                $($(#[$field_meta])* pub $field: $ty,)*
            }
        )*

        /// The structs of this file, as Rust lays them out.
        pub(in crate::abi) const STRUCTS: &[$crate::abi::StructLayout] = &[$($crate::abi::StructLayout {
            name: stringify!($name),
            size: size_of::<$name>(),
            align: align_of::<$name>(),
            fields: &[$($crate::abi::FieldLayout {
                name: stringify!($field),
                offset: std::mem::offset_of!($name, $field),
                size: size_of::<$ty>(),
            },)*],
        },)*];
    };
}

/// Defines integer and string constants and, in the same breath, the module's `CONSTANTS`.
macro_rules! c_constants {
    (
        $($(#[$meta:meta])* pub const $name:ident: $ty:ident = $value:expr;)*
        $(strings { $($(#[$string_meta:meta])* pub const $string:ident = $text:expr;)* })?
    ) => {
        $($(#[$meta])* pub const $name: $ty = $value;)*
        $($($(#[$string_meta])* pub const $string: &str = $text;)*)?

        /// The constants of this file.
        pub(in crate::abi) const CONSTANTS: &[$crate::abi::Constant] = &[
            $($crate::abi::Constant {
                name: stringify!($name),
                value: $crate::abi::ConstantValue::Integer($name as i64),
            },)*
            $($($crate::abi::Constant {
                name: stringify!($string),
                value: $crate::abi::ConstantValue::String($string),
            },)*)?
        ];
    };
}

pub(super) use {c_constants, c_structs};
