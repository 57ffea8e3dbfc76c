/* Decode one crop of a JPEG and resize it, without the GIL and without decoding the pixels around the crop.

   Rows above the crop are only entropy-decoded, columns beside it are skipped, and decoding stops after the crop's
   last row (libjpeg-turbo's jpeg_skip_scanlines and jpeg_crop_scanline). resize.h resizes each row across as soon
   as it is decoded, while it is in the CPU's cache. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <math.h>
#include <setjmp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include <jpeglib.h>
#include <jerror.h>

#include "resize.h"

/* MARGIN: columns decoded on each side of the crop, see decode_into.
   TIMED_ROWS: the clock is read for one row in so many; reading it for each row takes 1 to 2 % of the time.
   MAX_SIDE: of the result in pixels, so that no product overflows. */
enum { MARGIN = 8, TIMED_ROWS = 16, MAX_SIDE = 65535 };

/* UNSUPPORTED: not a JPEG of one or three components. */
enum outcome { DONE, UNSUPPORTED, DAMAGED, NO_MEMORY };

/* A damaged header may claim any size, and a progressive JPEG needs memory for all of it. Pillow's limit. */
static const double MAX_PIXELS = 2.0 * 89478485;

/* ---- decode ---------------------------------------------------------------------------------------- */

struct job {
    const u8 *encoded;
    size_t bytes;
    unsigned y, x, height, width;
    int out_height, out_width, flip;
    u8 *out; /* [3][out_height][out_width] */
    struct jpeg_decompress_struct jpeg;
    struct jpeg_error_mgr errors;
    jmp_buf escape;
    char reason[JMSG_LENGTH_MAX];
    struct window columns, lines;
    u8 *row, *rows;
    double resize_s, all_s;
};

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + 1e-9 * (double)time.tv_nsec;
}

static void fail(j_common_ptr jpeg) {
    struct job *job = jpeg->client_data;
    jpeg->err->format_message(jpeg, job->reason);
    longjmp(job->escape, 1);
}

/* Of libjpeg's warnings, only an early end of the data makes a sample bad. Pillow does the same, and ImageNet has
   files with stray bytes that everyone trains on. */
static void on_message(j_common_ptr jpeg, int level) {
    if (level < 0 && jpeg->err->msg_code == JWRN_JPEG_EOF) fail(jpeg);
}

static enum outcome decode_into(struct job *job) {
    struct jpeg_decompress_struct *jpeg = &job->jpeg;
    jpeg->err = jpeg_std_error(&job->errors);
    jpeg->client_data = job;
    job->errors.error_exit = fail;
    job->errors.emit_message = on_message;
    if (setjmp(job->escape)) return DAMAGED;
    jpeg_create_decompress(jpeg);
    jpeg_mem_src(jpeg, job->encoded, job->bytes);
    jpeg_read_header(jpeg, TRUE);
    if (jpeg->num_components != 1 && jpeg->num_components != 3) return UNSUPPORTED;
    if (job->x + job->width > jpeg->image_width || job->y + job->height > jpeg->image_height) {
        snprintf(job->reason, sizeof job->reason, "the image is %u × %u, smaller than its crop", jpeg->image_width,
                 jpeg->image_height);
        return DAMAGED;
    }
    if ((double)jpeg->image_width * jpeg->image_height > MAX_PIXELS) {
        snprintf(job->reason, sizeof job->reason, "its header claims %u × %u pixels, too many to decode", jpeg->image_width,
                 jpeg->image_height);
        return DAMAGED;
    }
    jpeg->out_color_space = JCS_EXT_RGBX;
    jpeg_start_decompress(jpeg);
    /* Decode some columns more on both sides: a pixel's chroma is interpolated from its neighbours, and libjpeg
       gets that wrong for fewer than three columns of chroma. */
    JDIMENSION left = job->x > MARGIN ? job->x - MARGIN : 0, end = job->x + job->width + MARGIN;
    JDIMENSION span = (end < jpeg->image_width ? end : jpeg->image_width) - left;
    jpeg_crop_scanline(jpeg, &left, &span);

    size_t stride = 4 * (size_t)job->columns.outputs;
    /* The last window may reach past the row, with weights of 0. */
    job->row = calloc(span + 4 * job->columns.fours, 4);
    job->rows = malloc((job->height + 2 * job->lines.pairs) * stride);
    if (!job->row || !job->rows) return NO_MEMORY;
    if (job->y) jpeg_skip_scanlines(jpeg, job->y);
    double timed_s = 0;
    for (unsigned i = 0; i < job->height; i++) {
        jpeg_read_scanlines(jpeg, &job->row, 1);
        double begin = i % TIMED_ROWS ? 0 : now();
        across(&job->columns, job->row + 4 * (job->x - left), job->rows + i * stride);
        if (i % TIMED_ROWS == 0) timed_s += now() - begin;
    }
    job->resize_s += timed_s * job->height / ((job->height + TIMED_ROWS - 1) / TIMED_ROWS);
    double begin = now();
    size_t plane = (size_t)job->out_height * job->out_width;
    for (int i = 0; i < job->out_height; i++)
        down(&job->lines, i, job->rows, stride, job->out_width, plane, job->out + (size_t)i * job->out_width);
    job->resize_s += now() - begin;
    return DONE;
}

static enum outcome decode(struct job *job) {
    enum outcome outcome = NO_MEMORY;
    double begin = now();
    if (make_window(&job->columns, job->width, job->out_width, job->flip) &&
        make_window(&job->lines, job->height, job->out_height, 0)) {
        job->resize_s = now() - begin;
        outcome = decode_into(job);
        jpeg_destroy_decompress(&job->jpeg);
    }
    free_window(&job->columns);
    free_window(&job->lines);
    free(job->row);
    free(job->rows);
    job->all_s = now() - begin;
    return outcome;
}

/* ---- Python ---------------------------------------------------------------------------------------- */

PyDoc_STRVAR(crop_doc,
             "crop(encoded, y, x, height, width, flip, out) -> tuple[float, float] | None\n\n"
             "Decode the box of a JPEG, resize and flip it, and write it to `out`: uint8[3, h, w], RGB, contiguous.\n\n"
             "Returns the seconds spent on decoding and on resizing. Returns None, and leaves `out` unchanged, if the\n"
             "file is not a JPEG of one or three components. Raises ValueError if it is damaged, or smaller than its\n"
             "box.");

static PyObject *crop(PyObject *module, PyObject *args) {
    PyObject *into;
    Py_buffer encoded, out;
    int y, x, height, width;
    struct job job;
    memset(&job, 0, sizeof job);
    if (!PyArg_ParseTuple(args, "y*iiiipO", &encoded, &y, &x, &height, &width, &job.flip, &into)) return NULL;
    if (PyObject_GetBuffer(into, &out, PyBUF_C_CONTIGUOUS | PyBUF_WRITABLE)) {
        PyBuffer_Release(&encoded);
        return NULL;
    }
    PyObject *result = NULL;
    if (y < 0 || x < 0 || height < 1 || width < 1 || out.ndim != 3 || out.itemsize != 1 || out.shape[0] != 3 ||
        !out.len || out.shape[1] > MAX_SIDE || out.shape[2] > MAX_SIDE) {
        PyErr_SetString(PyExc_ValueError, "the box is empty or negative, or `out` is not uint8[3, h, w]");
    } else {
        job.out_height = (int)out.shape[1], job.out_width = (int)out.shape[2];
        job.encoded = encoded.buf;
        job.bytes = encoded.len;
        job.y = y, job.x = x, job.height = height, job.width = width;
        job.out = out.buf;
        enum outcome outcome = UNSUPPORTED;
        if (job.bytes > 2 && memcmp(job.encoded, "\xff\xd8\xff", 3) == 0) {
            Py_BEGIN_ALLOW_THREADS;
            outcome = decode(&job);
            Py_END_ALLOW_THREADS;
        }
        if (outcome == NO_MEMORY)
            PyErr_NoMemory();
        else if (outcome == DAMAGED)
            PyErr_SetString(PyExc_ValueError, job.reason);
        else if (outcome == UNSUPPORTED)
            result = Py_NewRef(Py_None);
        else
            result = Py_BuildValue("dd", job.all_s - job.resize_s, job.resize_s);
    }
    PyBuffer_Release(&encoded);
    PyBuffer_Release(&out);
    return result;
}

static PyMethodDef methods[] = {{"crop", crop, METH_VARARGS, crop_doc}, {NULL, NULL, 0, NULL}};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT,
    .m_name = "jpeg_crop",
    .m_size = -1,
    .m_methods = methods,
};

PyMODINIT_FUNC PyInit_jpeg_crop(void) {
    choose_instructions();
    return PyModule_Create(&module);
}
