//! Tensor views: borrowed memory with a shape and strides, read and written by copying.

mod context;
mod element;
mod layout;
mod lent;
mod memory;
mod place;

use std::ffi::c_void;
use std::fmt;
use std::marker::PhantomData;

pub(crate) use context::Outside;
pub use element::{Dtype, Element};
pub(crate) use layout::{Layout, MAX_DIMS};
pub use lent::Lent;
pub(crate) use place::Reach;
pub use place::{DeviceMemory, Memory};

use crate::error::{Error, Result};
use crate::types::Device;

/// A view that is read. Lives as long as the memory it borrows.
#[derive(Clone, Copy)]
pub struct View<'a> {
    base: *const u8,
    layout: Layout,
    memory: Memory,
    borrow: PhantomData<&'a [u8]>,
}

/// A view that is read and written.
pub struct ViewMut<'a> {
    base: *mut u8,
    layout: Layout,
    memory: Memory,
    borrow: PhantomData<&'a mut [u8]>,
}

/// Layout and position of the first element, when every element lies within `len` elements.
fn within<T: Element>(len: usize, shape: &[usize], strides: Option<&[isize]>, offset: usize) -> Result<Layout> {
    let strides: Option<Vec<i64>> = strides.map(|strides| strides.iter().map(|&stride| stride as i64).collect());
    let layout = Layout::new(T::DTYPE, shape, strides.as_deref())?;
    if let Some((low, high)) = layout.reach() {
        let first = offset as i128;
        if first + i128::from(low) < 0 || first + i128::from(high) >= len as i128 {
            let message = format!(
                "a view of shape {shape:?}, strides {:?} and offset {offset} reaches outside a slice of {len} elements",
                &layout.strides[..layout.ndim]
            );
            return Err(Error::shape_mismatch(message));
        }
    }
    Ok(layout)
}

impl<'a> View<'a> {
    /// A row-major view of a whole slice.
    pub fn new<T: Element>(data: &'a [T], shape: &[usize]) -> Result<Self> {
        let layout = within::<T>(data.len(), shape, None, 0)?;
        if layout.count != data.len() {
            return Err(Error::shape_mismatch(format!("shape {shape:?} does not fit a slice of {}", data.len())));
        }
        Ok(Self { base: data.as_ptr().cast(), layout, memory: Memory::Main, borrow: PhantomData })
    }

    /// A view with strides and the position of its first element, both in elements.
    pub fn strided<T: Element>(data: &'a [T], shape: &[usize], strides: &[isize], offset: usize) -> Result<Self> {
        let layout = within::<T>(data.len(), shape, Some(strides), offset)?;
        Ok(Self { base: data.as_ptr().wrapping_add(offset).cast(), layout, memory: Memory::Main, borrow: PhantomData })
    }

    /// A view of memory anywhere. `first` is the address of the first element, on a device one of the device's; strides are in
    /// elements, row-major when there are none.
    ///
    /// # Safety
    /// For `'a`, every element lies in `memory`, is aligned and can be read; on a device, in the order of the view's stream.
    pub unsafe fn of_memory(
        first: *const c_void,
        dtype: Dtype,
        shape: &[usize],
        strides: Option<&[i64]>,
        memory: Memory,
    ) -> Result<Self> {
        let layout = Layout::new(dtype, shape, strides)?;
        Ok(Self { base: first.cast(), layout, memory, borrow: PhantomData })
    }

    /// # Safety
    /// For `'a`, `base` plus every offset of `layout` is aligned and readable.
    pub(crate) unsafe fn from_parts(base: *const u8, layout: Layout, memory: Memory) -> Self {
        Self { base, layout, memory, borrow: PhantomData }
    }

    /// The first element and the layout.
    pub(crate) fn parts(&self) -> (*const u8, &Layout) {
        (self.base, &self.layout)
    }

    /// The extents.
    pub fn shape(&self) -> &[usize] {
        self.layout.shape()
    }

    /// The element type.
    pub fn dtype(&self) -> Dtype {
        self.layout.dtype
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.layout.count
    }

    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.layout.count == 0
    }

    /// Whether the elements follow each other in row-major order.
    pub fn is_contiguous(&self) -> bool {
        self.layout.is_contiguous()
    }

    /// Where the elements are.
    pub fn memory(&self) -> Memory {
        self.memory
    }

    /// The device that they are on.
    pub fn device(&self) -> Device {
        self.memory.device()
    }

    /// Strides in elements; those of a single element may be anything.
    pub fn strides(&self) -> &[i64] {
        self.layout.strides()
    }

    /// The address of the first element, where its memory is; anything when there is no element.
    pub fn as_ptr(&self) -> *const c_void {
        self.base.cast()
    }

    /// The elements in row-major order.
    ///
    /// # Panics
    /// When they are not in main memory.
    pub fn to_vec(&self) -> Vec<f32> {
        self.memory.expect_main();
        // SAFETY: every way to make a view checks or requires that its elements can be read.
        unsafe { memory::read(self.base, &self.layout) }
    }

    /// The elements in row-major order, bit for bit; `None` when they are of another type.
    ///
    /// # Panics
    /// When they are not in main memory.
    pub fn elements<T: Element>(&self) -> Option<Vec<T>> {
        self.memory.expect_main();
        // SAFETY: as above, and the type is the layout's.
        (T::DTYPE == self.dtype()).then(|| unsafe { memory::elements(self.base.cast(), &self.layout) })
    }

    /// The `index`-th slice along the first axis.
    ///
    /// # Panics
    /// When there is no such slice.
    pub fn item(&self, index: usize) -> View<'a> {
        let (offset, layout) = self.layout.item(index);
        let base = self.base.wrapping_offset(offset as isize * layout.dtype.size() as isize);
        Self { base, layout, ..*self }
    }
}

impl<'a> ViewMut<'a> {
    /// A row-major view of a whole slice.
    pub fn new<T: Element>(data: &'a mut [T], shape: &[usize]) -> Result<Self> {
        let layout = *View::new(data, shape)?.parts().1;
        Ok(Self { base: data.as_mut_ptr().cast(), layout, memory: Memory::Main, borrow: PhantomData })
    }

    /// A view with strides and the position of its first element, both in elements. Elements must not overlap.
    pub fn strided<T: Element>(data: &'a mut [T], shape: &[usize], strides: &[isize], offset: usize) -> Result<Self> {
        let layout = within::<T>(data.len(), shape, Some(strides), offset)?;
        layout.check_writable()?;
        Ok(Self {
            base: data.as_mut_ptr().wrapping_add(offset).cast(),
            layout,
            memory: Memory::Main,
            borrow: PhantomData,
        })
    }

    /// As [`View::of_memory`], for memory that is written. Elements must not overlap.
    ///
    /// # Safety
    /// As [`View::of_memory`], and the memory may be written and is not read or written through anything else for `'a`.
    pub unsafe fn of_memory(
        first: *mut c_void,
        dtype: Dtype,
        shape: &[usize],
        strides: Option<&[i64]>,
        memory: Memory,
    ) -> Result<Self> {
        let layout = Layout::new(dtype, shape, strides)?;
        layout.check_writable()?;
        Ok(Self { base: first.cast(), layout, memory, borrow: PhantomData })
    }

    /// # Safety
    /// For `'a`, `base` plus every offset of `layout` is aligned, readable and writable.
    pub(crate) unsafe fn from_parts(base: *mut u8, layout: Layout, memory: Memory) -> Self {
        Self { base, layout, memory, borrow: PhantomData }
    }

    /// The first element and the layout.
    pub(crate) fn parts(&self) -> (*mut u8, &Layout) {
        (self.base, &self.layout)
    }

    /// The same view, to read.
    pub fn as_view(&self) -> View<'_> {
        View { base: self.base, layout: self.layout, memory: self.memory, borrow: PhantomData }
    }

    /// The extents.
    pub fn shape(&self) -> &[usize] {
        self.layout.shape()
    }

    /// The element type.
    pub fn dtype(&self) -> Dtype {
        self.layout.dtype
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.layout.count
    }

    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.layout.count == 0
    }

    /// Where the elements are.
    pub fn memory(&self) -> Memory {
        self.memory
    }

    /// The device that they are on.
    pub fn device(&self) -> Device {
        self.memory.device()
    }

    /// Strides in elements; those of a single element may be anything.
    pub fn strides(&self) -> &[i64] {
        self.layout.strides()
    }

    /// Whether the elements follow each other in row-major order.
    pub fn is_contiguous(&self) -> bool {
        self.layout.is_contiguous()
    }

    /// The address of the first element, where its memory is; anything when there is no element.
    pub fn as_mut_ptr(&mut self) -> *mut c_void {
        self.base.cast()
    }

    /// The elements in row-major order.
    ///
    /// # Panics
    /// When they are not in main memory.
    pub fn to_vec(&self) -> Vec<f32> {
        self.as_view().to_vec()
    }

    /// Writes all elements, given in row-major order and rounded to the dtype.
    ///
    /// # Panics
    /// When they are not in main memory.
    pub fn write(&mut self, values: &[f32]) -> Result<()> {
        if values.len() != self.len() {
            let message = format!("{} values for a view of shape {:?}", values.len(), self.shape());
            return Err(Error::shape_mismatch(message));
        }
        self.fill(values);
        Ok(())
    }

    /// As [`ViewMut::write`], when the number of values is known to be right.
    pub(crate) fn fill(&mut self, values: &[f32]) {
        self.memory.expect_main();
        // SAFETY: every way to make a writable view checks or requires that its elements can be written.
        unsafe { memory::write(self.base, &self.layout, values) };
    }

    /// The `index`-th slice along the first axis.
    ///
    /// # Panics
    /// When there is no such slice.
    pub fn item_mut(&mut self, index: usize) -> ViewMut<'_> {
        let (offset, layout) = self.layout.item(index);
        let base = self.base.wrapping_offset(offset as isize * layout.dtype.size() as isize);
        ViewMut { base, layout, memory: self.memory, borrow: PhantomData }
    }

    /// Copies bit for bit from a view of the same shape and dtype.
    ///
    /// # Panics
    /// When shapes or dtypes differ, or one of the views is not in main memory.
    pub fn copy_from(&mut self, from: &View<'_>) {
        from.memory.expect_main();
        self.memory.expect_main();
        // SAFETY: both views are valid, and `copy` asserts that they agree and reads all before it writes.
        unsafe { memory::copy(from.base, &from.layout, self.base, &self.layout) }
    }
}

fn describe(f: &mut fmt::Formatter<'_>, name: &str, layout: &Layout, memory: Memory) -> fmt::Result {
    write!(f, "{name}({:?}, {:?}, strides {:?}, {memory:?})", layout.dtype, layout.shape(), layout.strides())
}

impl fmt::Debug for View<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        describe(f, "View", &self.layout, self.memory)
    }
}

impl fmt::Debug for ViewMut<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        describe(f, "ViewMut", &self.layout, self.memory)
    }
}
