//! What a step did.

use super::error::sh_status;
use super::layout::{c_constants, c_structs};

c_constants! {
    /// At least one item was corrected.
    pub const SH_CORRECTED: i32 = 1;
    /// The strength is zero.
    pub const SH_SKIPPED_STRENGTH: i32 = 2;
    /// Outside the share of steps that is corrected.
    pub const SH_SKIPPED_RANGE: i32 = 3;
    /// Between two corrected steps.
    pub const SH_SKIPPED_INTERVAL: i32 = 4;
    /// Only the first evaluation of a step is corrected.
    pub const SH_SKIPPED_SUB_EVALUATION: i32 = 5;
    /// Batch 0.
    pub const SH_SKIPPED_EMPTY: i32 = 6;
}

c_structs! {
    /// What happened to one item of the batch.
    pub struct sh_item_report {
        /// `SH_OK`, or why this item was left as it was.
        pub status: sh_status,
        /// Before the correction; NaN when not computed.
        pub score: f32,
        /// L2 norm of the gradient (VP); NaN when not computed.
        pub gradient_norm: f32,
        /// L2 norm of what was added (VP).
        pub correction_norm: f32,
    }

    /// Owned by the caller.
    pub struct sh_report {
        /// The caller's `sizeof`.
        pub struct_size: u32,
        /// The caller's `sizeof(sh_item_report)`.
        pub item_size: u32,
        /// Null or room for `item_count`.
        pub items: *mut sh_item_report,
        /// Room in `items`.
        pub item_count: u64,
        /// Spent in the plugin.
        pub seconds: f64,
        /// `SH_CORRECTED` or `SH_SKIPPED_*`.
        pub outcome: i32,
        /// 0.
        pub reserved: u32,
    }
}
