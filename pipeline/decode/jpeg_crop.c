/* Decode one crop of a JPEG and resize it, without the GIL and without the pixels around the crop.

   Of the rows above the crop only the bits are read, the columns beside it are left out, and it stops after
   the crop's last row (libjpeg-turbo's jpeg_skip_scanlines and jpeg_crop_scanline). Each row is resized by
   resize.h as it comes, while it is in the cache. */

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

/* TIMED: of so many rows the clock is read at one: to read it at each would take 1 to 2 % of the time.
   MOST_SIDE: of what is made, so that no product overflows. */
enum { MARGIN = 8, TIMED = 16, MOST_SIDE = 65535 };

/* OTHER: not a JPEG of one or three components. */
enum outcome { DONE, OTHER, DAMAGED, NO_MEMORY };

/* A damaged header may claim any size, and a progressive JPEG needs memory for all of it. Pillow's limit. */
static const double MOST_PIXELS = 2.0 * 89478485;

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

/* Of libjpeg's warnings only the end of the data makes a sample bad: so does Pillow, and ImageNet has files
   with stray bytes that everyone trains on. */
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
    if (jpeg->num_components != 1 && jpeg->num_components != 3) return OTHER;
    if (job->x + job->width > jpeg->image_width || job->y + job->height > jpeg->image_height) {
        snprintf(job->reason, sizeof job->reason, "it is %u × %u, smaller than its crop", jpeg->image_width,
                 jpeg->image_height);
        return DAMAGED;
    }
    if ((double)jpeg->image_width * jpeg->image_height > MOST_PIXELS) {
        snprintf(job->reason, sizeof job->reason, "it claims to be %u × %u", jpeg->image_width,
                 jpeg->image_height);
        return DAMAGED;
    }
    jpeg->out_color_space = JCS_EXT_RGBX;
    jpeg_start_decompress(jpeg);
    /* Some more columns on both sides: the chroma of a pixel is interpolated from its neighbours', and
       libjpeg gets that wrong for less than three columns of chroma. */
    JDIMENSION left = job->x > MARGIN ? job->x - MARGIN : 0, end = job->x + job->width + MARGIN;
    JDIMENSION span = (end < jpeg->image_width ? end : jpeg->image_width) - left;
    jpeg_crop_scanline(jpeg, &left, &span);

    size_t stride = 4 * (size_t)job->columns.outputs;
    /* The last window may reach past the row, by weights of 0. */
    job->row = calloc(span + 4 * job->columns.fours, 4);
    job->rows = malloc((job->height + 2 * job->lines.pairs) * stride);
    if (!job->row || !job->rows) return NO_MEMORY;
    if (job->y) jpeg_skip_scanlines(jpeg, job->y);
    double timed_s = 0;
    for (unsigned i = 0; i < job->height; i++) {
        jpeg_read_scanlines(jpeg, &job->row, 1);
        double begin = i % TIMED ? 0 : now();
        across(&job->columns, job->row + 4 * (job->x - left), job->rows + i * stride);
        if (i % TIMED == 0) timed_s += now() - begin;
    }
    job->resize_s += timed_s * job->height / ((job->height + TIMED - 1) / TIMED);
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
             "Decode that box of a JPEG into `out`, uint8[3, h, w], RGB, contiguous.\n"
             "Seconds that went into decoding it, and into resizing it.\n"
             "None, and `out` untouched, if it is no JPEG of one or three components.\n"
             "ValueError if it is damaged, or smaller than its box.");

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
        !out.len || out.shape[1] > MOST_SIDE || out.shape[2] > MOST_SIDE) {
        PyErr_SetString(PyExc_ValueError, "the box is empty or negative, or `out` is not uint8[3, h, w]");
    } else {
        job.out_height = (int)out.shape[1], job.out_width = (int)out.shape[2];
        job.encoded = encoded.buf;
        job.bytes = encoded.len;
        job.y = y, job.x = x, job.height = height, job.width = width;
        job.out = out.buf;
        enum outcome outcome = OTHER;
        if (job.bytes > 2 && memcmp(job.encoded, "\xff\xd8\xff", 3) == 0) {
            Py_BEGIN_ALLOW_THREADS;
            outcome = decode(&job);
            Py_END_ALLOW_THREADS;
        }
        if (outcome == NO_MEMORY)
            PyErr_NoMemory();
        else if (outcome == DAMAGED)
            PyErr_SetString(PyExc_ValueError, job.reason);
        else if (outcome == OTHER)
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
