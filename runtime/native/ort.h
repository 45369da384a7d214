/* The part of onnxruntime's C interface that an operator of one's own needs.
 *
 * onnxruntime promises that the table of functions only grows at its end (onnxruntime_c_api.h, "OrtApi"), so a
 * function is named here by its place in it. Its headers are not in the Python wheel, and nothing is linked.
 */
#ifndef GEMINI_ORT_H
#define GEMINI_ORT_H

#include <stddef.h>
#include <stdint.h>

typedef void *Status; /* NULL where a call succeeded */
typedef void *const *Api;
typedef struct {
    Api (*get_api)(uint32_t version);
    const char *(*get_version)(void);
} ApiBase;

enum { API_VERSION = 17 }; /* the first with every function below */
enum { TYPE_ANY = 0, TYPE_FLOAT = 1, TYPE_UINT8 = 2, TYPE_INT8 = 3, TYPE_INT32 = 6, TYPE_INT64 = 7, TYPE_FLOAT16 = 10 };
enum { VARIADIC = 2 };   /* OrtCustomOpInputOutputCharacteristic */
enum { FAIL = 1, INVALID_ARGUMENT = 2 }; /* OrtErrorCode */

enum {
    CREATE_STATUS = 0,
    CREATE_DOMAIN = 26,
    DOMAIN_ADD = 27,
    ADD_DOMAIN = 28,
    TENSOR_DATA = 51,
    ELEMENT_TYPE = 60,
    DIMENSION_COUNT = 61,
    DIMENSIONS = 62,
    ELEMENT_COUNT = 64,
    TYPE_AND_SHAPE = 65,
    CONTEXT_INPUT = 90,
    CONTEXT_OUTPUT = 91,
    RELEASE_STATUS = 93,
    RELEASE_SHAPE = 99,
    ATTRIBUTE_FLOATS = 162,
    ATTRIBUTE_INTS = 163,
    NODE_INPUT_COUNT = 230,
    NODE_OUTPUT_COUNT = 231,
    CONSTANT_INPUT = 249,
    PARALLEL_FOR = 274,
};

#define CALL(api, place, ...) ((Status(*)())(api)[place])(__VA_ARGS__)

typedef struct CustomOp CustomOp;
struct CustomOp { /* OrtCustomOp, in its order */
    uint32_t version;
    void *(*create)(const CustomOp *, Api, const void *);
    const char *(*name)(const CustomOp *);
    const char *(*provider)(const CustomOp *);
    int (*input_type)(const CustomOp *, size_t);
    size_t (*input_count)(const CustomOp *);
    int (*output_type)(const CustomOp *, size_t);
    size_t (*output_count)(const CustomOp *);
    void (*compute)(void *, void *);
    void (*destroy)(void *);
    int (*input_kind)(const CustomOp *, size_t);
    int (*output_kind)(const CustomOp *, size_t);
    int (*memory)(const CustomOp *, size_t);
    int (*inputs_at_least)(const CustomOp *);
    int (*inputs_alike)(const CustomOp *);
    int (*outputs_at_least)(const CustomOp *);
    int (*outputs_alike)(const CustomOp *);
    Status (*create_checked)(const CustomOp *, Api, const void *, void **);
    Status (*compute_checked)(void *, void *);
    Status (*infer_shape)(const CustomOp *, void *);
    int (*first_version)(const CustomOp *);
    int (*last_version)(const CustomOp *);
    size_t (*may_inplace)(int **, int **);
    void (*release_inplace)(int *, int *);
    size_t (*alias_map)(int **, int **);
    void (*release_alias)(int *, int *);
};

#endif
