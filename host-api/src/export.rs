//! The two doors of a plugin library.

use abi_stable::StableAbi;
use abi_stable::library::RootModule;
use abi_stable::sabi_types::VersionStrings;

use crate::abi::{TABLES_FINGERPRINT, equal, sh_entry};

#[doc(hidden)]
pub use abi_stable;

/// The Rust door: a reference to the table that the C door returns. The layout check at load compares the tables of both
/// sides; data structs carry their size and may grow, so it leaves them alone.
#[repr(C)]
#[derive(StableAbi)]
#[sabi(kind(Prefix(prefix_ref = SamplerHookRef, prefix_fields = SamplerHookPrefix)))]
#[sabi(phantom_const_param = TABLES_FINGERPRINT)]
#[sabi(missing_field(panic))]
pub struct SamplerHook {
    /// The same table as `sampler_hook_entry` returns.
    #[sabi(unsafe_opaque_field)]
    #[sabi(last_prefix_field)]
    pub entry: &'static sh_entry,
}

impl RootModule for SamplerHookRef {
    abi_stable::declare_root_module_statics! {SamplerHookRef}
    const BASE_NAME: &'static str = "sampler_hook";
    const NAME: &'static str = "sampler_hook";
    const VERSION_STRINGS: VersionStrings = VersionStrings::new("0.3.0");
}

/// The symbol that abi_stable looks for, which [`export_plugins!`](crate::export_plugins) has to spell out.
#[doc(hidden)]
pub const ROOT_MODULE_SYMBOL: &str = "_1as_0lib_1header_0root_bmodule_bloader";

const _: () = assert!(equal(ROOT_MODULE_SYMBOL.as_bytes(), abi_stable::library::ROOT_MODULE_LOADER_NAME.as_bytes()));

/// Makes a crate of type `cdylib` a plugin library: the C symbol `sampler_hook_entry` and abi_stable's root module, both
/// leading to one table with the plugins named. Once per crate, in its root.
/// `host_api::export_plugins!(MyPlugin, AnotherPlugin);` - see `examples/scale.rs` for a whole library.
#[macro_export]
macro_rules! export_plugins {
    ($($plugin:ty),+ $(,)?) => {
        $crate::plugin_list!(struct SamplerHookPlugins: $($plugin),+);

        static SAMPLER_HOOK_ENTRY: $crate::abi::sh_entry = $crate::plugin::entry::<SamplerHookPlugins>();

        /// The entry of this library, or null when it does not speak that major version.
        #[unsafe(no_mangle)]
        pub extern "C" fn sampler_hook_entry(abi_major: u32) -> *const $crate::abi::sh_entry {
            match abi_major {
                $crate::abi::SH_ABI_MAJOR => &raw const SAMPLER_HOOK_ENTRY,
                _ => ::std::ptr::null(),
            }
        }

        const _: () = {
            use $crate::export::abi_stable::library::{
                __call_root_module_loader, CheckTypeLayout, LibHeader, RootModuleResult,
            };
            use $crate::export::abi_stable::prefix_type::PrefixTypeTrait;
            use $crate::export::{SamplerHook, SamplerHookRef};

            fn module() -> SamplerHookRef {
                SamplerHook { entry: &SAMPLER_HOOK_ENTRY }.leak_into_prefix()
            }

            extern "C" fn load() -> RootModuleResult {
                __call_root_module_loader(module)
            }

            #[unsafe(export_name = "_1as_0lib_1header_0root_bmodule_bloader")]
            static ROOT_MODULE: LibHeader = {
                // SAFETY: `load` returns what a `SamplerHookRef` was made of.
                unsafe { LibHeader::from_constructor::<SamplerHookRef>(load, CheckTypeLayout::Yes) }
            };
        };
    };
}

/// Names a list of plugins, for a program that links its plugins instead of loading them.
#[macro_export]
macro_rules! plugin_list {
    ($visibility:vis struct $name:ident: $($plugin:ty),+ $(,)?) => {
        /// The plugins of this library.
        $visibility struct $name;

        impl $crate::plugin::PluginList for $name {
            const PLUGINS: &'static [$crate::plugin::Registration] = &[$($crate::plugin::Registration::of::<$plugin>()),+];
        }
    };
}
